//! One entry of the trunk, whatever its kind.

use std::{fmt, sync::Arc};

use candle::Result;
use candle_nn::VarBuilder;

use super::double::DoubleBlock;
use super::linear::{Linear, Lora};
use super::modulation::Modulation;
use super::output_projection::OutputProjection;
use super::replacement::ReplacementBlock;
use super::single::SingleBlock;
use super::stream::{Conditioning, Stream};
use crate::layout::{BlockKind, BlockSpec, FluxConfig};

/// The loaded weights of one [`BlockSpec`]. Clones share the tensors.
#[derive(Clone, Debug)]
pub enum Block {
    /// Text and image tokens with weights of their own.
    Double(Box<DoubleBlock>),
    /// All tokens with the same weights.
    Single(Box<SingleBlock>),
    /// What stands in for removed blocks.
    Replacement(Box<ReplacementBlock>),
    /// Read from where its weights are whenever it is run.
    Offloaded(Box<Offloaded>),
}

/// A block whose weights are not on the device, and the LoRA beside them, which is.
#[derive(Clone)]
pub struct Offloaded {
    config: Arc<FluxConfig>,
    spec: BlockSpec,
    vb: VarBuilder<'static>,
    lora: Vec<(&'static str, Lora)>,
    /// Projections that have taken the place of those that are read, wherever their tensors are.
    exchanged: Vec<(&'static str, Linear)>,
}

impl fmt::Debug for Offloaded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Offloaded").field(&self.spec).finish()
    }
}

impl From<ReplacementBlock> for Block {
    fn from(block: ReplacementBlock) -> Self {
        Self::Replacement(Box::new(block))
    }
}

impl Block {
    /// Reads the block of `spec`, whose tensors are below `vb`.
    pub fn new(config: &FluxConfig, spec: &BlockSpec, vb: &VarBuilder) -> Result<Self> {
        Ok(match spec {
            BlockSpec::Original(id) => match id.kind {
                BlockKind::Double => Self::Double(Box::new(DoubleBlock::new(config, vb)?)),
                BlockKind::Single => Self::Single(Box::new(SingleBlock::new(config, vb)?)),
            },
            BlockSpec::Replaced(replacement) => {
                Self::Replacement(Box::new(ReplacementBlock::new(config, replacement, vb)?))
            }
        })
    }

    /// A block that is read below `vb` whenever it is run.
    pub fn offloaded(config: &Arc<FluxConfig>, spec: &BlockSpec, vb: &VarBuilder<'static>) -> Self {
        Self::Offloaded(Box::new(Offloaded {
            config: config.clone(),
            spec: spec.clone(),
            vb: vb.clone(),
            lora: Vec::new(),
            exchanged: Vec::new(),
        }))
    }

    /// Whether its weights are read whenever it is run.
    pub fn is_offloaded(&self) -> bool {
        matches!(self, Self::Offloaded(_))
    }

    /// The block with its weights on the device.
    pub fn resident(&self) -> Result<Self> {
        let Self::Offloaded(offloaded) = self else {
            return Ok(self.clone());
        };
        let mut block = Self::new(&offloaded.config, &offloaded.spec, &offloaded.vb)?;
        for (name, linear) in block.linears_mut() {
            if let Some((_, other)) = offloaded.exchanged.iter().find(|(other, _)| *other == name) {
                *linear = other.to_device(offloaded.vb.device())?;
            }
            if let Some((_, lora)) = offloaded.lora.iter().find(|(other, _)| *other == name) {
                linear.set_lora(Some(lora.clone()))?;
            }
        }
        Ok(block)
    }

    /// [`resident`](Self::resident), for another thread to run: candle gives every thread a CUDA stream of its own, so the
    /// copies that this one has started must have ended.
    pub(super) fn load_on_thread(&self) -> Result<Self> {
        let block = self.resident()?;
        self.synchronize()?;
        Ok(block)
    }

    /// Waits until all that this thread has started on a offloaded block's device is done.
    pub(super) fn synchronize(&self) -> Result<()> {
        match self {
            Self::Offloaded(offloaded) => offloaded.vb.device().synchronize(),
            _ => Ok(()),
        }
    }

    /// Puts `linear` in the place of the projection `name`. A offloaded block keeps it where its tensors are, so that they
    /// may wait on the host, and brings it to the device with the rest.
    ///
    /// Fails where there is no projection of that name.
    pub fn exchange(&mut self, name: &'static str, linear: Linear) -> Result<()> {
        if let Self::Offloaded(offloaded) = self {
            offloaded.exchanged.retain(|(other, _)| *other != name);
            offloaded.exchanged.push((name, linear));
            return Ok(());
        }
        let mut linears = self.linears_mut().into_iter();
        match linears.find(|(other, _)| *other == name) {
            Some((_, place)) => *place = linear,
            None => candle::bail!("there is no projection `{name}`"),
        }
        Ok(())
    }

    /// This offloaded block with the LoRA of `resident`; a block that is not offloaded is `resident` itself.
    #[must_use]
    pub fn with_lora_of(&self, mut resident: Self) -> Self {
        let Self::Offloaded(offloaded) = self else {
            return resident;
        };
        let mut offloaded = offloaded.clone();
        let linears = resident.linears_mut();
        offloaded.lora = linears
            .into_iter()
            .filter_map(|(name, linear)| Some((name, linear.lora()?.clone())))
            .collect();
        Self::Offloaded(offloaded)
    }

    /// Whether a LoRA is attached to one of its projections.
    pub fn has_lora(&self) -> bool {
        match self {
            Self::Offloaded(offloaded) => !offloaded.lora.is_empty(),
            _ => {
                let mut block = self.clone();
                let linears = block.linears_mut();
                linears.iter().any(|(_, linear)| linear.lora().is_some())
            }
        }
    }

    /// The same block outside of any gradient graph, sharing the storage of its tensors.
    #[must_use]
    pub fn detached(&self) -> Self {
        let mut block = self.clone();
        if let Self::Offloaded(offloaded) = &mut block {
            for (_, lora) in &mut offloaded.lora {
                *lora = lora.detached();
            }
        }
        for (_, linear) in block.linears_mut() {
            *linear = linear.detached();
        }
        block
    }

    /// One step of the fold.
    pub fn forward(&self, stream: &Stream, conditioning: &Conditioning) -> Result<Stream> {
        match self {
            Self::Offloaded(_) => self.resident()?.forward(stream, conditioning),
            Self::Double(block) => block.forward(stream, conditioning),
            Self::Single(block) => block.forward(stream, conditioning),
            Self::Replacement(block) => block.forward(stream, conditioning),
        }
    }

    /// Shift, scale and gate of the block's first branch, for its text and its image tokens, as a modulated
    /// replacement keeps them; `None` for replacements.
    pub fn modulations(&self) -> Result<Option<[Modulation<3>; 2]>> {
        let [txt, img] = match self {
            Self::Double(block) => block.modulations(),
            Self::Single(block) => block.modulations(),
            Self::Replacement(_) => return Ok(None),
            Self::Offloaded(_) => return self.resident()?.modulations(),
        };
        // the first three parts of three (single) or six (double)
        let first = |lin: &Linear| -> Result<Modulation<3>> {
            let rows = 3 * lin.shape()?.1;
            let weight = lin.weight()?.narrow(0, 0, rows)?;
            let bias = lin.bias().map(|b| b.narrow(0, 0, rows)).transpose()?;
            Ok(Modulation {
                lin: Linear::new(weight, bias)?,
            })
        };
        Ok(Some([first(txt)?, first(img)?]))
    }

    /// The last step of a kept block: one for all tokens (single), or text first, then image (double); none for
    /// replacements.
    pub fn output_projections(
        &self,
        stream: &Stream,
        conditioning: &Conditioning,
    ) -> Result<Vec<OutputProjection>> {
        Ok(match self {
            Self::Double(block) => block.output_projections(stream, conditioning)?.into(),
            Self::Single(block) => vec![block.output_projection(stream, conditioning)?],
            Self::Replacement(_) => vec![],
            Self::Offloaded(_) => return self.resident()?.output_projections(stream, conditioning),
        })
    }

    /// Every projection with its canonical name below the block (`img_attn.qkv`, `linear1`, `linear.img`): the one
    /// place to attach LoRA, merge or count. None for a offloaded block: make it [`resident`](Self::resident) first.
    pub fn linears_mut(&mut self) -> Vec<(&'static str, &mut Linear)> {
        match self {
            Self::Double(block) => block.linears_mut(),
            Self::Single(block) => block.linears_mut(),
            Self::Replacement(block) => block.linears_mut(),
            Self::Offloaded(_) => vec![],
        }
    }
}

#[cfg(test)]
mod tests {
    use candle::{DType, Device, Tensor, Var};

    use super::*;
    use crate::layout::{BlockId, Form, Replacement, unpruned};
    use crate::model::Flux;
    use crate::model::testing::{SmallInputs, close, random, random_flux_on, small_config};

    /// A double block, a single block, and one replaced jointly and one for each stream.
    fn all_kinds(dtype: DType) -> Result<Flux> {
        all_kinds_on(&Device::Cpu, small_config(), dtype)
    }

    fn all_kinds_on(device: &Device, mut config: FluxConfig, dtype: DType) -> Result<Flux> {
        config.layout = unpruned(1, 3);
        for (index, joint) in [(1, true), (2, false)] {
            config.layout[index] = BlockSpec::Replaced(Replacement {
                replaces: vec![BlockId::single(index - 1)],
                form: Form::Linear,
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
                    let bias = linear.bias().cloned().expect("replacements have a bias");
                    *linear =
                        Linear::new(var("weight", linear.weight()?)?, Some(var("bias", bias)?))?;
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
            let largest = (0..gradient.len())
                .max_by(|&i, &j| gradient[i].abs().total_cmp(&gradient[j].abs()));
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
}
