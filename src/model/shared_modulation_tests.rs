//! A family without biases and pooled text, with shared modulation, SwiGLU and four rotary axes: the model's code against
//! the formulas written out one after another.

use std::collections::HashMap;

use candle::{D, DType, Device, Result, Tensor, Var};
use candle_nn::VarBuilder;

use super::testing::{SmallInputs, close, random, random_flux, small_config, tensors_of};
use super::{Conditioning, Flux, cost};
use crate::layout::{BlockSpec, Family, FluxConfig, Form, Replacement, unpruned};

/// Two double and two single blocks of a family that differs from FLUX.1 in everything that `FluxConfig` can say.
fn config() -> FluxConfig {
    FluxConfig {
        vec_in_dim: 0,
        guidance_embed: false,
        axes_dims: vec![4, 4, 4, 4],
        theta: 2000.0,
        family: Family::FLUX2,
        layout: unpruned(2, 2),
        ..small_config()
    }
}

/// The weights of a model by name, in f64, and the formulas on them.
struct Slow {
    config: FluxConfig,
    weights: HashMap<String, Tensor>,
}

impl Slow {
    fn linear(&self, name: &str, x: &Tensor) -> Result<Tensor> {
        let weight = &self.weights[&format!("{name}.weight")];
        x.broadcast_matmul(&weight.t()?)
    }

    /// silu(vec), (batch, hidden).
    fn activated(&self, timestep: &Tensor) -> Result<Tensor> {
        let angle = |i: usize| 10_000f64.powf(-(i as f64) / 128.0);
        let frequencies: Vec<f64> = (0..128).map(angle).collect();
        let frequencies = Tensor::from_vec(frequencies, (1, 128), &Device::Cpu)?;
        let angles = (timestep.to_dtype(DType::F64)? * 1000.0)?.unsqueeze(1)?;
        let angles = angles.broadcast_mul(&frequencies)?;
        let x = Tensor::cat(&[angles.cos()?, angles.sin()?], 1)?;
        let x = self.linear("time_in.in_layer", &x)?.silu()?;
        self.linear("time_in.out_layer", &x)?.silu()
    }

    /// Shift, scale, gate (, shift, scale, gate), each (batch, 1, hidden).
    fn modulation(&self, name: &str, activated: &Tensor, parts: usize) -> Result<Vec<Tensor>> {
        let all = self.linear(name, activated)?.unsqueeze(1)?;
        all.chunk(parts, 2)
    }

    fn norm(x: &Tensor, shift: &Tensor, scale: &Tensor) -> Result<Tensor> {
        let x = x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?;
        let variance = x.sqr()?.mean_keepdim(D::Minus1)?;
        let x = x.broadcast_div(&(variance + 1e-6)?.sqrt()?)?;
        x.broadcast_mul(&(scale + 1.0)?)?.broadcast_add(shift)
    }

    fn swiglu(x: &Tensor) -> Result<Tensor> {
        let halves = x.chunk(2, D::Minus1)?;
        halves[0].silu()? * &halves[1]
    }

    /// Queries, keys and values (batch, heads, tokens, head size), queries and keys normalised.
    fn heads(&self, qkv: &Tensor, norms: &str) -> Result<[Tensor; 3]> {
        let (batch, tokens, _) = qkv.dims3()?;
        let (heads, size) = (self.config.num_heads, self.config.head_dim());
        let parts = qkv.chunk(3, 2)?;
        let split = |x: &Tensor| x.reshape((batch, tokens, heads, size))?.transpose(1, 2);
        let rms = |x: &Tensor, name: &str| -> Result<Tensor> {
            let mean = split(x)?.sqr()?.mean_keepdim(D::Minus1)?;
            let x = split(x)?.broadcast_div(&(mean + 1e-6)?.sqrt()?)?;
            x.broadcast_mul(&self.weights[&format!("{norms}.{name}_norm.scale")])
        };
        Ok([
            rms(&parts[0], "query")?,
            rms(&parts[1], "key")?,
            split(&parts[2])?,
        ])
    }

    /// Rotates neighbouring pairs by position · theta^(-2i / axis size), a pair at a time.
    fn rotate(&self, x: &Tensor, ids: &[Vec<f64>]) -> Result<Tensor> {
        let shape = x.dims4()?;
        let mut values = x.flatten_all()?.to_vec1::<f64>()?;
        for (row, values) in values.chunks_mut(shape.3).enumerate() {
            let mut pair = 0;
            for (axis, &dim) in self.config.axes_dims.iter().enumerate() {
                for i in 0..dim / 2 {
                    let frequency = self.config.theta.powf(-2.0 * i as f64 / dim as f64);
                    let (sin, cos) = (ids[row % shape.2][axis] * frequency).sin_cos();
                    let (a, b) = (values[pair], values[pair + 1]);
                    values[pair] = a * cos - b * sin;
                    values[pair + 1] = a * sin + b * cos;
                    pair += 2;
                }
            }
        }
        Tensor::from_vec(values, shape, &Device::Cpu)
    }

    /// (batch, tokens, hidden)
    fn attention(&self, [q, k, v]: [Tensor; 3], ids: &[Vec<f64>]) -> Result<Tensor> {
        let (q, k) = (self.rotate(&q, ids)?, self.rotate(&k, ids)?);
        let scale = (self.config.head_dim() as f64).powf(-0.5);
        let scores = (q.matmul(&k.t()?)? * scale)?;
        let weights = candle_nn::ops::softmax(&scores, D::Minus1)?;
        weights
            .matmul(&v.contiguous()?)?
            .transpose(1, 2)?
            .flatten_from(2)
    }

    fn forward(&self, inputs: &super::Inputs) -> Result<Tensor> {
        let f64 = |x: &Tensor| x.to_dtype(DType::F64);
        let ids = Tensor::cat(&[inputs.txt_ids, inputs.img_ids], 0)?;
        let ids = f64(&ids)?.to_vec2::<f64>()?;
        let txt_len = inputs.txt.dim(1)?;
        let activated = self.activated(inputs.timestep)?;
        let mut img = self.linear("img_in", &f64(inputs.img)?)?;
        let mut txt = self.linear("txt_in", &f64(inputs.txt)?)?;
        let of_img = self.modulation("double_stream_modulation_img.lin", &activated, 6)?;
        let of_txt = self.modulation("double_stream_modulation_txt.lin", &activated, 6)?;
        for i in 0..2 {
            let half = |stream: &str, x: &Tensor, m: &[Tensor]| -> Result<[Tensor; 3]> {
                let attn = format!("double_blocks.{i}.{stream}_attn");
                let qkv = self.linear(&format!("{attn}.qkv"), &Self::norm(x, &m[0], &m[1])?)?;
                self.heads(&qkv, &format!("{attn}.norm"))
            };
            let (t, m) = (half("txt", &txt, &of_txt)?, half("img", &img, &of_img)?);
            let both = |i: usize| Tensor::cat(&[&t[i], &m[i]], 2);
            let attended = self.attention([both(0)?, both(1)?, both(2)?], &ids)?;
            let after = |stream: &str, x: &Tensor, y: &Tensor, m: &[Tensor]| -> Result<Tensor> {
                let block = format!("double_blocks.{i}.{stream}");
                let y = self.linear(&format!("{block}_attn.proj"), y)?;
                let x = (x + y.broadcast_mul(&m[2])?)?;
                let z = self.linear(&format!("{block}_mlp.0"), &Self::norm(&x, &m[3], &m[4])?)?;
                let y = self.linear(&format!("{block}_mlp.2"), &Self::swiglu(&z)?)?;
                &x + y.broadcast_mul(&m[5])?
            };
            let img_len = attended.dim(1)? - txt_len;
            txt = after("txt", &txt, &attended.narrow(1, 0, txt_len)?, &of_txt)?;
            img = after("img", &img, &attended.narrow(1, txt_len, img_len)?, &of_img)?;
        }
        let mut x = Tensor::cat(&[txt, img], 1)?;
        let m = self.modulation("single_stream_modulation.lin", &activated, 3)?;
        let hidden = self.config.hidden_size;
        for i in 0..2 {
            let block = format!("single_blocks.{i}");
            let all = self.linear(&format!("{block}.linear1"), &Self::norm(&x, &m[0], &m[1])?)?;
            let qkv = self.heads(&all.narrow(2, 0, 3 * hidden)?, &format!("{block}.norm"))?;
            let mlp = all.narrow(2, 3 * hidden, 2 * self.config.mlp_size)?;
            let z = Tensor::cat(&[self.attention(qkv, &ids)?, Self::swiglu(&mlp)?], 2)?;
            let y = self.linear(&format!("{block}.linear2"), &z)?;
            x = (x + y.broadcast_mul(&m[2])?)?;
        }
        let img = x.narrow(1, txt_len, x.dim(1)? - txt_len)?;
        let m = self.modulation("final_layer.adaLN_modulation.1", &activated, 2)?;
        self.linear("final_layer.linear", &Self::norm(&img, &m[0], &m[1])?)
    }
}

#[test]
fn it_computes_what_the_formulas_say() -> Result<()> {
    let config = config();
    let weights = tensors_of(&config)?;
    let wide = weights
        .iter()
        .map(|(name, x)| Ok((name.clone(), x.to_dtype(DType::F64)?)));
    let slow = Slow {
        config: config.clone(),
        weights: wide.collect::<Result<_>>()?,
    };
    let inputs = SmallInputs::new(&config, 2)?;
    let want = slow.forward(&inputs.borrowed())?;
    for (dtype, tolerance) in [(DType::F64, 2e-5), (DType::F32, 3e-5), (DType::BF16, 5e-2)] {
        let got = random_flux(&config, dtype)?.forward(&inputs.borrowed(), &mut ())?;
        close(&got, &want, tolerance).map_err(|e| candle::Error::Msg(format!("{dtype:?}: {e}")))?;
    }
    Ok(())
}

#[test]
fn it_has_no_tensor_too_many_and_costs_what_it_has() -> Result<()> {
    let config = config();
    let tensors = tensors_of(&config)?;
    assert!(
        !tensors
            .keys()
            .any(|name| name.rsplit('.').next() == Some("bias"))
    );
    assert!(
        !tensors
            .keys()
            .any(|name| name.contains("_mod.") || name.contains("vector_in"))
    );
    let read: usize = tensors.values().map(Tensor::elem_count).sum();
    assert_eq!(cost::model(&config, 4, 3).parameters, read as u64);
    Ok(())
}

/// Every weight of the model as a trainable, in f64.
fn trainable(config: &FluxConfig) -> Result<(Flux, HashMap<String, Var>)> {
    let vars = tensors_of(config)?
        .into_iter()
        .map(|(name, x)| Ok((name, Var::from_tensor(&x.to_dtype(DType::F64)?)?)));
    let vars: HashMap<String, Var> = vars.collect::<Result<_>>()?;
    let tensors = vars
        .iter()
        .map(|(name, var)| (name.clone(), var.as_tensor().clone()));
    let vb = VarBuilder::from_tensors(tensors.collect(), DType::F64, &Device::Cpu);
    Ok((Flux::new(config, vb)?, vars))
}

#[test]
fn its_gradients_agree_with_finite_differences() -> Result<()> {
    let config = config();
    let (flux, vars) = trainable(&config)?;
    let inputs = SmallInputs::new(&config, 2)?;
    let loss = || -> Result<Tensor> {
        let velocity = flux.forward(&inputs.borrowed(), &mut ())?;
        let weights = random("loss", velocity.dims())?.to_dtype(DType::F64)?;
        (velocity.sqr()? + velocity * weights)?.sum_all()
    };
    let gradients = loss()?.backward()?;
    // one projection of each kind, and the modulation that all blocks share
    for name in [
        "double_stream_modulation_img.lin.weight",
        "double_stream_modulation_txt.lin.weight",
        "single_stream_modulation.lin.weight",
        "double_blocks.0.txt_attn.qkv.weight",
        "double_blocks.1.img_mlp.0.weight",
        "double_blocks.0.img_mlp.2.weight",
        "single_blocks.0.linear1.weight",
        "single_blocks.1.linear2.weight",
    ] {
        let var = &vars[name];
        let gradient = gradients
            .get(var)
            .unwrap_or_else(|| panic!("no gradient for {name}"));
        let gradient = gradient.flatten_all()?.to_vec1::<f64>()?;
        let largest =
            (0..gradient.len()).max_by(|&i, &j| gradient[i].abs().total_cmp(&gradient[j].abs()));
        let entry = largest.expect("no weight is empty");
        assert!(
            gradient[entry].abs() > 1e-6,
            "the gradient of {name} is zero"
        );
        let original = var.as_tensor().copy()?;
        let moved = |step: f64| -> Result<f64> {
            let mut values = original.flatten_all()?.to_vec1::<f64>()?;
            values[entry] += step;
            var.set(&Tensor::from_vec(values, original.dims(), &Device::Cpu)?)?;
            loss()?.to_scalar()
        };
        let step = 1e-5;
        let slope = (moved(step)? - moved(-step)?) / (2.0 * step);
        var.set(&original)?;
        let error = (slope - gradient[entry]).abs() / slope.abs();
        assert!(
            error < 1e-4,
            "{name}: gradient {} instead of {slope}",
            gradient[entry]
        );
    }
    Ok(())
}

#[test]
fn its_blocks_can_be_replaced_in_every_form() -> Result<()> {
    let forms = [
        Form::Remove,
        Form::Linear,
        Form::Conditioned,
        Form::Modulated,
    ];
    for (k, form) in [0, 2].into_iter().flat_map(|k| forms.map(|form| (k, form))) {
        let mut config = config();
        let BlockSpec::Original(id) = config.layout[k] else {
            unreachable!()
        };
        config.layout[k] = BlockSpec::Replaced(Replacement {
            replaces: vec![id],
            form,
            joint: false,
        });
        let flux = random_flux(&config, DType::F32)?;
        let inputs = SmallInputs::new(&config, 1)?;
        let velocity = flux.forward(&inputs.borrowed(), &mut ())?;
        assert!(
            velocity.sqr()?.sum_all()?.to_scalar::<f32>()? > 0.0,
            "{form}"
        );
        let read: usize = tensors_of(&config)?.values().map(Tensor::elem_count).sum();
        assert_eq!(cost::model(&config, 4, 3).parameters, read as u64, "{form}");
    }
    Ok(())
}

/// A modulated layer in the place of a block takes the block's own parts of the shared modulation.
#[test]
fn a_modulated_layer_keeps_the_parts_of_its_block() -> Result<()> {
    let kept = random_flux(&config(), DType::F32)?;
    let inputs = SmallInputs::new(&config(), 1)?;
    let (stream, conditioning) = kept.embed(&inputs.borrowed())?;
    let shared = conditioning.shared()?;
    for (_, block) in kept.trunk.entries() {
        let expected = match block {
            super::Block::Double(_) => [&shared.txt[..3], &shared.img[..3]],
            _ => [&shared.single[..], &shared.single[..]],
        };
        let parts = block.modulations()?.expect("kept blocks have modulation");
        for (part, expected) in parts.iter().zip(expected) {
            for (a, b) in part.forward(&conditioning)?.iter().zip(expected) {
                close(a, b, 0.0)?;
            }
        }
    }
    let Conditioning {
        vec,
        timestep,
        rope,
        ..
    } = conditioning;
    let bare = Conditioning::new(vec, timestep, rope)?;
    assert!(bare.shared().is_err());
    assert!(
        kept.trunk
            .forward_range(0..1, &stream, &bare, &mut ())
            .is_err()
    );
    Ok(())
}
