//! What training moves: the layers of replaced blocks in full, LoRA factors next to the projections of unpruned blocks.
//! An ordered list with names that stay; `optimiser` moves them.

use std::{collections::BTreeMap, ops::Range};

use anyhow::{Context, Result, ensure};
use candle::{DType, Device, Tensor, Var};

use super::{
    data::Key,
    recipe::{LoraRecipe, Projections},
};
use crate::{
    layout::BlockSpec,
    model::{Linear, Lora, Trunk},
    sample::noise::Generator,
};

/// One trainable tensor, f32 on the device.
#[derive(Clone, Debug)]
pub struct Trainable {
    /// `double.01.linear.img.weight`, `single.03.linear1.lora-a`: original block identity, projection, part.
    pub name: String,
    /// The value, shared with the block that computes with it.
    pub var: Var,
}

impl Trainable {
    /// Whether it is a LoRA factor, and not a part of a replaced layer.
    pub fn is_lora(&self) -> bool {
        self.name.ends_with(".lora-a") || self.name.ends_with(".lora-b")
    }
}

/// Trained values by name, f32.
pub type Values = BTreeMap<String, Tensor>;

/// The group that a projection of an unpruned block belongs to.
fn group(projection: &str) -> Projections {
    match projection {
        "img_mod.lin" | "txt_mod.lin" | "modulation.lin" => Projections::Modulation,
        "img_mlp.0" | "img_mlp.2" | "txt_mlp.0" | "txt_mlp.2" => Projections::Mlp,
        _ => Projections::Attention,
    }
}

fn wanted(recipe: &LoraRecipe, projection: &str) -> bool {
    // a single block's MLP has its projections in common with attention
    recipe.targets.contains(&group(projection))
        || (matches!(projection, "linear1" | "linear2")
            && recipe.targets.contains(&Projections::Mlp))
}

/// Makes the entries `range` of `trunk` trainable and lists their trainables, those that are so already included.
///
/// Replaced entries: every weight and bias, starting from `trained` or the value at hand. Unpruned ones: a LoRA of
/// `trained` or a new one, with B zero, on every projection that the recipe names; none without a rank. A offloaded block
/// becomes resident unless it is to `stay` offloaded.
///
/// # Errors
/// When a trained value has another shape.
pub fn attach(
    trunk: &mut Trunk,
    range: Range<usize>,
    recipe: &LoraRecipe,
    seed: u64,
    trained: &Values,
    device: &Device,
    stay: bool,
) -> Result<Vec<Trainable>> {
    let mut out = Vec::new();
    for (spec, block) in trunk.entries_mut().get_mut(range).into_iter().flatten() {
        let id = spec.id();
        let replaced = matches!(spec, BlockSpec::Replaced(_));
        let mut resident = block.resident()?;
        for (projection, linear) in resident.linears_mut() {
            let name = format!("{id}.{projection}");
            let mut var = |part: &str, start: &dyn Fn() -> Result<Tensor>| -> Result<Tensor> {
                let name = format!("{name}.{part}");
                let value = match trained.get(&name) {
                    Some(value) => value.clone(),
                    None => start()?,
                };
                let value = value.to_dtype(DType::F32)?.to_device(device)?;
                let var = Var::from_tensor(&value.detach())
                    .with_context(|| format!("trainable `{name}`"))?;
                let tensor = var.as_tensor().clone();
                out.push(Trainable { name, var });
                Ok(tensor)
            };
            if replaced {
                let (weight, bias) = (linear.weight()?, linear.bias().cloned());
                if weight.is_variable() {
                    out.extend(listed(&name, linear)?);
                    continue;
                }
                let weight = var("weight", &|| Ok(weight.clone()))?;
                let bias = match bias {
                    Some(bias) => Some(var("bias", &|| Ok(bias.clone()))?),
                    None => None,
                };
                *linear = Linear::new(weight, bias)?;
            } else if linear.lora().is_some() {
                out.extend(listed(&name, linear)?);
            } else if let Some(rank) = recipe.rank.filter(|_| wanted(recipe, projection)) {
                let (output, input) = linear.shape()?;
                let rank = rank.min(input).min(output);
                let a = var("lora-a", &|| factor(seed, &name, rank, input))?;
                let b = var("lora-b", &|| {
                    Ok(Tensor::zeros((output, rank), DType::F32, &Device::Cpu)?)
                })?;
                let scale = recipe.scale();
                linear
                    .set_lora(Some(Lora { a, b, scale }))
                    .with_context(|| format!("`{name}`"))?;
            }
        }
        *block = if stay {
            block.with_lora_of(resident)
        } else {
            resident
        };
    }
    Ok(out)
}

/// The trainables of a projection that is trainable already.
fn listed(name: &str, linear: &Linear) -> Result<Vec<Trainable>> {
    let (weight, lora) = (linear.weight()?, linear.lora());
    let parts = [
        ("weight", Some(&weight)),
        ("bias", linear.bias()),
        ("lora-a", lora.map(|l| &l.a)),
        ("lora-b", lora.map(|l| &l.b)),
    ];
    let trainables = parts.into_iter().filter_map(|(part, tensor)| {
        let tensor = tensor.filter(|t| t.is_variable())?;
        let var = Var::from_tensor(tensor).ok()?;
        let name = format!("{name}.{part}");
        Some(Trainable { name, var })
    });
    Ok(trainables.collect())
}

/// A LoRA's A, (rank, input): normal with variance 1 / input, by the seed and the name alone.
fn factor(seed: u64, name: &str, rank: usize, input: usize) -> Result<Tensor> {
    let index = name.bytes().fold(0u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01B3)
    });
    let key = Key {
        seed,
        purpose: Key::FACTORS,
        index,
    };
    let normal = Generator::new(key.stream().bits()).randn((rank, input), &Device::Cpu)?;
    Ok((normal / (input as f64).sqrt())?)
}

/// Copies of the values as they are now, on the CPU.
///
/// # Errors
/// When memory is short.
pub fn values(trainables: &[Trainable]) -> Result<Values> {
    let values = trainables.iter().map(|t| {
        let value = t.var.as_tensor().detach().copy()?.to_device(&Device::Cpu)?;
        Ok((t.name.clone(), value))
    });
    values.collect()
}

/// Puts values back, in place.
///
/// # Errors
/// When one is missing or has another shape.
pub fn restore(trainables: &[Trainable], values: &Values) -> Result<()> {
    for Trainable { name, var } in trainables {
        let value = values
            .get(name)
            .with_context(|| format!("no value of `{name}` was saved"))?;
        ensure!(
            value.dims() == var.dims(),
            "the saved `{name}` has shape {:?}, expected {:?}",
            value.shape(),
            var.shape()
        );
        var.set(&value.to_device(var.device())?)?;
    }
    Ok(())
}

/// The same blocks outside of any graph; they follow the trainables, whose storage they share.
pub fn frozen(trunk: &Trunk) -> Trunk {
    let entries = trunk.entries().iter();
    Trunk::new(
        entries
            .map(|(spec, block)| (spec.clone(), block.detached()))
            .collect(),
    )
}
