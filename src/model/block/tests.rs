//! Tests of `block`.

use candle::{DType, Device, Tensor, Var};

use super::*;
use crate::layout::{BlockId, Form, Replacement, unpruned};
use crate::model::testing::{SmallInputs, close, random, random_flux_on, small_config};
use crate::model::{Flux, ops};

/// A double block, a single block, and one replaced jointly and one for each stream.
fn all_kinds(dtype: DType) -> Result<Flux> {
    all_kinds_on(&Device::Cpu, small_config(), dtype)
}

fn all_kinds_on(device: &Device, config: FluxConfig, dtype: DType) -> Result<Flux> {
    all_kinds_as(Form::Linear, device, config, dtype)
}

fn all_kinds_as(form: Form, device: &Device, mut config: FluxConfig, dtype: DType) -> Result<Flux> {
    config.layout = unpruned(1, 3);
    for (index, joint) in [(1, true), (2, false)] {
        config.layout[index] = BlockSpec::Replaced(Replacement {
            replaces: vec![BlockId::single(index - 1)],
            form,
            joint,
        });
    }
    random_flux_on(device, &config, dtype)
}

/// Makes LoRA factors of every projection, and weights and biases of replacements, trainable.
fn trainables(flux: &mut Flux) -> Result<Vec<(String, Var)>> {
    let mut vars = vec![];
    for (index, (spec, block)) in flux.trunk.entries_mut().iter_mut().enumerate() {
        let replaced = matches!(spec, BlockSpec::Replaced(_));
        for (name, linear) in block.linears_mut() {
            let (output, input) = linear.shape()?;
            let (dtype, device) = (linear.weight()?.dtype(), linear.device());
            let mut var = |part: &str, x: Tensor| -> Result<Tensor> {
                let var = Var::from_tensor(&x.to_dtype(dtype)?.to_device(&device)?)?;
                let tensor = var.as_tensor().clone();
                vars.push((format!("{index}.{name}.{part}"), var));
                Ok(tensor)
            };
            if replaced {
                let bias = linear.bias().cloned();
                let weight = var("weight", linear.weight()?)?;
                *linear = Linear::new(weight, bias.map(|x| var("bias", x)).transpose()?)?;
            }
            let a = var("a", (random(name, (2, input))? * 0.3)?)?;
            let b = var("b", (random(name, (output, 2))? * 0.3)?)?;
            linear.set_lora(Some(Lora { a, b, scale: 0.7 }))?;
        }
    }
    Ok(vars)
}

fn loss(flux: &Flux, inputs: &SmallInputs) -> Result<Tensor> {
    let velocity = flux.forward(&inputs.borrowed(), &mut ())?;
    let weights = random("loss", velocity.dims())?.to_dtype(velocity.dtype())?;
    let weights = weights.to_device(velocity.device())?;
    (velocity.sqr()? + velocity * weights)?.sum_all()
}

#[test]
fn gradients_agree_with_finite_differences_in_every_kind_of_block() -> Result<()> {
    let mut flux = all_kinds(DType::F64)?;
    let inputs = SmallInputs::new(&small_config(), 2)?;
    let vars = trainables(&mut flux)?;
    // 10 + 3 projections and 3 layers with LoRA, and 3 weights and biases
    assert_eq!(vars.len(), 2 * (13 + 3) + 2 * 3);
    let gradients = loss(&flux, &inputs)?.backward()?;
    for (name, var) in &vars {
        let gradient = gradients
            .get(var)
            .unwrap_or_else(|| panic!("no gradient for {name}"));
        let gradient = gradient.flatten_all()?.to_vec1::<f64>()?;
        let original = var.as_tensor().copy()?;
        // the entry where a wrong gradient shows best
        let largest =
            (0..gradient.len()).max_by(|&i, &j| gradient[i].abs().total_cmp(&gradient[j].abs()));
        let entry = largest.expect("no trainable is empty");
        assert!(
            gradient[entry].abs() > 1e-6,
            "the gradient of {name} is zero"
        );
        let moved = |step: f64| -> Result<f64> {
            let mut values = original.flatten_all()?.to_vec1::<f64>()?;
            values[entry] += step;
            var.set(&Tensor::from_vec(values, original.dims(), &Device::Cpu)?)?;
            loss(&flux, &inputs)?.to_scalar()
        };
        let step = 1e-5;
        let slope = (moved(step)? - moved(-step)?) / (2.0 * step);
        var.set(&original)?;
        let error = (slope - gradient[entry]).abs() / slope.abs();
        // candle's derivative of GELU has constants of six digits
        assert!(
            error < 1e-4,
            "{name}: gradient {} instead of {slope}",
            gradient[entry]
        );
    }
    Ok(())
}

#[test]
fn the_backward_pass_knows_every_operation_of_every_block() -> Result<()> {
    let inputs = SmallInputs::new(&small_config(), 3)?;
    for form in [Form::Linear, Form::Conditioned, Form::Modulated] {
        let mut flux = all_kinds_as(form, &Device::Cpu, small_config(), DType::F32)?;
        let vars = trainables(&mut flux)?;
        let velocity = flux.forward(&inputs.borrowed(), &mut ())?;
        assert!(ops::is_known(&velocity), "{form:?}");
        let grad = random("loss", velocity.dims())?;
        let mut ours = ops::backward(&velocity, &grad)?;
        let theirs = (&velocity * &grad)?.sum_all()?.backward()?;
        for (name, var) in &vars {
            let ours = ours
                .remove(var)
                .unwrap_or_else(|| panic!("no gradient for {name}"));
            let theirs = theirs.get(var).expect("candle finds one");
            close(&ours, theirs, 1e-5)?;
        }
    }
    Ok(())
}

/// In f64 the backward passes are composed of candle operations, in f32 they are kernels.
#[test]
fn fused_gradients_are_the_composed_ones() -> Result<()> {
    let inputs = SmallInputs::new(&small_config(), 3)?;
    let gradients = |dtype| -> Result<Vec<(String, Tensor)>> {
        let mut flux = all_kinds(dtype)?;
        let vars = trainables(&mut flux)?;
        let mut gradients = loss(&flux, &inputs)?.backward()?;
        let each = vars.into_iter().map(|(name, var)| {
            let gradient = gradients.remove(&var).expect("every trainable has one");
            (name, gradient)
        });
        Ok(each.collect())
    };
    let (fused, composed) = (gradients(DType::F32)?, gradients(DType::F64)?);
    for ((name, fused), (_, composed)) in fused.iter().zip(&composed) {
        close(fused, composed, 2e-5).map_err(|e| candle::Error::Msg(format!("{name}: {e}")))?;
    }
    Ok(())
}

/// With the head size of the bundled model, which all builds of flash attention have.
#[cfg(feature = "cuda")]
#[test]
fn a_gpu_computes_and_learns_what_a_cpu_does() -> Result<()> {
    let Some(gpu) = crate::model::testing::gpu() else {
        return Ok(());
    };
    let mut config = small_config();
    (config.hidden_size, config.axes_dims) = (64, vec![8, 12, 12]);
    let inputs = SmallInputs::new(&config, 3)?;
    let run = |device: &Device, dtype, train: bool| -> Result<Vec<(String, Tensor)>> {
        let mut flux = all_kinds_on(device, config.clone(), dtype)?;
        let inputs = inputs.to_device(device)?;
        let on_cpu = |x: &Tensor| x.to_device(&Device::Cpu);
        if !train {
            let velocity = flux.forward(&inputs.borrowed(), &mut ())?;
            return Ok(vec![("velocity".to_owned(), on_cpu(&velocity)?)]);
        }
        let vars = trainables(&mut flux)?;
        let gradients = loss(&flux, &inputs)?.backward()?;
        let each = vars.into_iter().map(|(name, var)| {
            let gradient = gradients.get(&var).expect("every trainable has one");
            Ok((name, on_cpu(gradient)?))
        });
        each.collect()
    };
    for (dtype, train, tolerance) in [
        (DType::F32, false, 2e-5),
        (DType::BF16, false, 3e-2),
        (DType::F32, true, 2e-5),
    ] {
        let (got, want) = (run(&gpu, dtype, train)?, run(&Device::Cpu, dtype, train)?);
        for ((name, got), (_, want)) in got.iter().zip(&want) {
            close(got, want, tolerance)
                .map_err(|e| candle::Error::Msg(format!("{name} in {dtype:?}: {e}")))?;
        }
    }
    Ok(())
}

#[test]
fn training_computes_what_inference_computes() -> Result<()> {
    for (dtype, tolerance) in [(DType::F32, 3e-6), (DType::BF16, 3e-2)] {
        let mut flux = all_kinds(dtype)?;
        let inputs = SmallInputs::new(&small_config(), 3)?;
        trainables(&mut flux)?;
        let tracked = flux.forward(&inputs.borrowed(), &mut ())?;
        assert!(tracked.track_op());
        for (_, block) in flux.trunk.entries_mut() {
            for (_, linear) in block.linears_mut() {
                let merged = linear.merge()?;
                *linear =
                    Linear::new(merged.weight()?.detach(), merged.bias().map(Tensor::detach))?;
            }
        }
        let fused = flux.forward(&inputs.borrowed(), &mut ())?;
        assert!(!fused.track_op());
        close(&fused, &tracked, tolerance)?;
    }
    Ok(())
}

#[test]
fn projecting_its_own_inputs_again_is_a_forward() -> Result<()> {
    let flux = all_kinds(DType::F32)?;
    let inputs = SmallInputs::new(&small_config(), 2)?;
    let (mut stream, conditioning) = flux.embed(&inputs.borrowed())?;
    for (_, block) in flux.trunk.entries() {
        let want = block.forward(&stream, &conditioning)?;
        let steps = block.output_projections(&stream, &conditioning)?;
        match block {
            Block::Replacement(_) => assert!(block.project(&stream, &steps).is_err()),
            _ => {
                let got = block.project(&stream, &steps)?;
                assert_eq!(got.txt_len, want.txt_len);
                let values = |stream: &Stream| stream.tokens.to_vec3::<f32>();
                assert_eq!(values(&got)?, values(&want)?);
            }
        }
        stream = want;
    }
    Ok(())
}
