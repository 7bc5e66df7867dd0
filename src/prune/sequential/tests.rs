use std::path::Path;

use super::{super::trunk::pruned, *};
use crate::{
    fit::gram,
    layout::{BlockId, Form},
    model::{AffineLayer, Linear, ReplacementBlock},
    pipeline::{ModelChoice, Pipeline},
    sample::denoise::{Encoded, LatentSize},
    ui::Reporter,
};

fn runtime() -> Runtime {
    Runtime {
        device: Device::Cpu,
        dtype: DType::F32,
    }
}

fn random(scale: f32, shape: &[usize]) -> Tensor {
    Tensor::randn(0f32, scale, shape, &Device::Cpu).unwrap()
}

/// The bundled model, and noised latents of random latents and prompts.
fn bundled(images: usize) -> (Flux, NoisedLatents) {
    let pipeline = Pipeline::open(&ModelChoice::default()).unwrap();
    let vb = pipeline.transformer.var_builder(DType::F32, &Device::Cpu);
    let c = &pipeline.config;
    let prompts = Encoded::new(
        random(1.0, &[images, 12, c.context_in_dim]),
        random(1.0, &[images, c.vec_in_dim]),
    );
    let size = LatentSize {
        height: 8,
        width: 8,
        family: crate::layout::Family::FLUX1,
    };
    let latents = random(1.0, &[images, 16, c.out_channels]);
    let noised = NoisedLatents::new(latents, prompts, size, 3.5, 4, 1).unwrap();
    (Flux::new(c, vb).unwrap(), noised)
}

fn replace(id: BlockId, form: Form, joint: bool) -> Replacement {
    Replacement {
        replaces: vec![id],
        form,
        joint,
    }
}

fn fitting(refit_projections: RefitProjections) -> Fitting<'static> {
    Fitting {
        ridge: None,
        sequential: true,
        refit_projections,
        batch: 48,
        tokens: None,
        on_device: 0,
        in_memory: u64::MAX,
        scratch: Path::new("."),
    }
}

fn fit(
    flux: &Flux,
    noised: &NoisedLatents,
    replace: &[Replacement],
    refit: RefitProjections,
) -> Flux {
    fit_within(u64::MAX, flux, noised, replace, refit)
}

/// [`fit`] with `in_memory` bytes for token streams.
fn fit_within(
    in_memory: u64,
    flux: &Flux,
    noised: &NoisedLatents,
    replace: &[Replacement],
    refit: RefitProjections,
) -> Flux {
    let fitting = Fitting {
        in_memory,
        ..fitting(refit)
    };
    let bar = Reporter::silent().progress(1, "");
    let fits = fit_layers(flux, noised, replace, fitting, &runtime(), &bar).unwrap();
    let batches = noised.batches(fitting.batch).len();
    let steps = steps(&flux.trunk, batches, replace, &fitting);
    assert_eq!(bar.position(), steps as u64);
    let mut out = pruned(flux, replace, &fits.layers, &runtime()).unwrap();
    projections::put(&mut out, &fits.output_projections, &runtime()).unwrap();
    out
}

/// ‖velocity of `got` − velocity of `want`‖² / ‖velocity of `want`‖² on all noised latents.
fn off(got: &Flux, want: &Flux, noised: &NoisedLatents) -> f64 {
    let batch = noised
        .batch(0..noised.len(), &Device::Cpu, DType::F32)
        .unwrap();
    let velocity = |flux: &Flux| flux.forward(&batch.inputs(), &mut ()).unwrap();
    let (got, want) = (velocity(got), velocity(want));
    gram::square(&(got - &want).unwrap()).unwrap() / gram::square(&want).unwrap()
}

#[test]
fn a_block_that_is_a_layer_of_the_form_is_recovered() {
    // more noised latents than channels: each has but one vec
    let (flux, noised) = bundled(48);
    let layer = |vec: bool| AffineLayer {
        linear: Linear::new(random(0.02, &[128, 128]), Some(random(0.1, &[128]))).unwrap(),
        vec: vec.then(|| Linear::new(random(0.02, &[128, 128]), None).unwrap()),
        modulation: None,
    };
    for (form, joint) in [
        (Form::Linear, false),
        (Form::Linear, true),
        (Form::Conditioned, false),
        (Form::Conditioned, true),
    ] {
        let vec = form == Form::Conditioned;
        let known = if joint {
            ReplacementBlock::Joint(layer(vec))
        } else {
            ReplacementBlock::Streams {
                txt: layer(vec),
                img: layer(vec),
            }
        };
        let mut known_flux = flux.clone();
        known_flux.trunk = flux.trunk.with_block(12, known.into()).unwrap();
        let replace = [replace(BlockId::single(7), form, joint)];
        let fitted = fit(&known_flux, &noised, &replace, RefitProjections::All);
        let off = off(&fitted, &known_flux, &noised).sqrt();
        assert!(off < 1e-5, "{form} joint {joint}: {off}");
    }
}

#[test]
fn each_further_refit_brings_the_velocity_nearer() {
    let (flux, noised) = bundled(24);
    let replace = [
        replace(BlockId::double(4), Form::Linear, false),
        replace(BlockId::single(6), Form::Modulated, false),
    ];
    let [none, head, all] = [
        RefitProjections::None,
        RefitProjections::Head,
        RefitProjections::All,
    ]
    .map(|refit| off(&fit(&flux, &noised, &replace, refit), &flux, &noised));
    assert!(all < head && head < none, "{none} {head} {all}");
}

#[test]
fn nothing_is_refitted_where_nothing_is_replaced() {
    let (flux, noised) = bundled(2);
    let same = fit(&flux, &noised, &[], RefitProjections::All);
    assert!(off(&same, &flux, &noised) <= 0.0);
}

#[test]
fn streams_that_wait_in_a_file_give_the_same_weights() {
    let (flux, noised) = bundled(12);
    let replace = [
        replace(BlockId::double(4), Form::Modulated, false),
        replace(BlockId::single(6), Form::Linear, false),
        replace(BlockId::single(8), Form::Modulated, false),
    ];
    for refit in [RefitProjections::Head, RefitProjections::All] {
        let fit = |in_memory| fit_within(in_memory, &flux, &noised, &replace, refit);
        let in_memory = fit(u64::MAX);
        // none of them, and so many that the file begins with one of the pruned model's
        for room in [0, 4 << 20] {
            assert!(off(&fit(room), &in_memory, &noised) <= 0.0);
        }
    }
}

#[test]
fn a_layer_comes_nearer_with_the_block_ahead_of_it() {
    let ((flux, noised), runtime) = (bundled(24), runtime());
    let bar = Reporter::silent().progress(1, "");
    let left = |replacement: &Replacement, first: usize, ahead: bool| {
        let fitting = fitting(RefitProjections::All);
        let mut fit = SequentialFit::new(&flux, &noised, fitting, &runtime, &bar).unwrap();
        if ahead {
            fit.to(first - 1).unwrap();
            fit.ahead(replacement).unwrap();
            fit.replace(replacement, Original::Behind).unwrap();
        } else {
            fit.to(first).unwrap();
            fit.replace(replacement, Original::Before).unwrap();
        }
        let mut sum = 0.0;
        for batch in &fit.batches {
            let (original, pruned) = batch.load(&mut fit.store, &Device::Cpu).unwrap();
            sum += gram::square(&(original.tokens - pruned.tokens).unwrap()).unwrap();
        }
        let refitted = fit.out.output_projections.len();
        (sum, refitted)
    };
    for (id, first, form, joint) in [
        (BlockId::double(3), 3, Form::Linear, false),
        (BlockId::single(0), 5, Form::Conditioned, false),
        (BlockId::single(4), 9, Form::Linear, true),
        (BlockId::single(4), 9, Form::Remove, false),
    ] {
        let replacement = replace(id, form, joint);
        let (plain, none) = left(&replacement, first, false);
        let (together, refitted) = left(&replacement, first, true);
        assert!(together < 0.97 * plain, "{id} {form}: {together} {plain}");
        assert_eq!((none, refitted), (0, if first > 5 { 1 } else { 2 }));
    }
}

#[test]
fn nothing_is_refitted_ahead_where_nothing_kept_is_or_its_layer_has_a_gate() {
    let (flux, _) = bundled(1);
    let [linear, modulated] =
        [Form::Linear, Form::Modulated].map(|form| replace(BlockId::double(2), form, false));
    let asks = |fitting: &Fitting, at, first, replacement| {
        ahead::is_refitted(&flux.trunk, fitting, at, first, replacement)
    };
    let all = fitting(RefitProjections::All);
    assert!(asks(&all, 0, 2, &linear) && asks(&all, 1, 2, &linear));
    // the first of all, right behind another replacement, a gate, less than all, on the original's own activations
    assert!(!asks(&all, 0, 0, &linear) && !asks(&all, 2, 2, &linear));
    assert!(!asks(&all, 0, 2, &modulated));
    assert!(!asks(&fitting(RefitProjections::Head), 0, 2, &linear));
    let apart = Fitting {
        sequential: false,
        ..all
    };
    assert!(!asks(&apart, 0, 2, &linear));
}
