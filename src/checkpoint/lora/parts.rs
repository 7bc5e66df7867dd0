//! Names of tensors in LoRA files → modules and what the tensors are of them; modules → changes of weights.

use std::{collections::BTreeMap, sync::Arc};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use super::config::AdapterConfig;
use crate::checkpoint::{
    Checkpoint, Source,
    source::{Delta, DeltaForm, Factor, Magnitude},
};

/// What a tensor is of its module.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Role {
    Down,
    Up,
    UpBias,
    Alpha,
    /// `DoRA`'s, by PEFT: the user's weight scales the factors.
    Magnitude,
    /// `DoRA`'s, by kohya, `LyCORIS` and `OneTrainer`: the user's weight scales the change of the whole.
    DoraScale,
    /// `LoKr`, the left factor, or the product of its parts.
    Left,
    LeftA,
    LeftB,
    Right,
    RightA,
    RightB,
    /// `LoHa`, factors of the first and of the second product.
    FirstA,
    FirstB,
    SecondA,
    SecondB,
    Difference,
    BiasDifference,
}

/// Endings of names; longer ones of the same end first.
const ENDINGS: [(&str, Role); 32] = [
    (".lora_A.weight", Role::Down),
    (".lora_B.weight", Role::Up),
    (".lora_A", Role::Down),
    (".lora_B", Role::Up),
    (".lora_down.weight", Role::Down),
    (".lora_up.weight", Role::Up),
    (".lora.down.weight", Role::Down),
    (".lora.up.weight", Role::Up),
    (".lora_linear_layer.down.weight", Role::Down),
    (".lora_linear_layer.up.weight", Role::Up),
    (".down.weight", Role::Down),
    (".up.weight", Role::Up),
    (".lora_B.bias", Role::UpBias),
    (".lora_up.bias", Role::UpBias),
    (".alpha", Role::Alpha),
    (".lora_magnitude_vector.weight", Role::Magnitude),
    (".lora_magnitude_vector", Role::Magnitude),
    (".dora_scale", Role::DoraScale),
    (".lokr_w1", Role::Left),
    (".lokr_w1_a", Role::LeftA),
    (".lokr_w1_b", Role::LeftB),
    (".lokr_w2", Role::Right),
    (".lokr_w2_a", Role::RightA),
    (".lokr_w2_b", Role::RightB),
    (".hada_w1_a", Role::FirstA),
    (".hada_w1_b", Role::FirstB),
    (".hada_w2_a", Role::SecondA),
    (".hada_w2_b", Role::SecondB),
    (".diff", Role::Difference),
    (".diff_b", Role::BiasDifference),
    (".w_norm", Role::Difference),
    (".b_norm", Role::BiasDifference),
];

/// The module and the role of a tensor's name; `None` for names of no LoRA.
pub(super) fn split(name: &str) -> Option<(&str, Role)> {
    let known = |name: &str| {
        let fits = |(ending, role): &(&str, Role)| Some((name.strip_suffix(ending)?.len(), *role));
        ENDINGS.iter().find_map(fits)
    };
    let (end, role) = known(name).or_else(|| known(&without_adapter(name)?))?;
    Some((&name[..end], role))
}

/// A name without that of the adapter, which stands in it if a model that PEFT has wrapped was saved as it is:
/// `lora_A.style.weight`, `lokr_w1.style`.
fn without_adapter(name: &str) -> Option<String> {
    let mut ends = [".weight", ".bias", ""].into_iter();
    let (rest, leaf) = ends.find_map(|leaf| Some((name.strip_suffix(leaf)?, leaf)))?;
    let (rest, _) = rest.rsplit_once('.')?;
    let (_, word) = rest.rsplit_once('.')?;
    let words: &[&str] = match leaf {
        ".weight" => &["lora_A", "lora_B", "lora_magnitude_vector"],
        ".bias" => &["lora_B"],
        _ => &["lora_magnitude_vector", "lokr_w", "hada_w"],
    };
    let of_peft = words.iter().any(|start| word.starts_with(start));
    of_peft.then(|| format!("{rest}{leaf}"))
}

/// The tensors of one module.
#[derive(Clone, Debug, Default)]
pub(super) struct Parts {
    tensors: BTreeMap<Role, Source>,
}

/// What a module's tensors add to its weight and to its bias.
pub(super) struct Changes {
    pub(super) weight: Option<Arc<Delta>>,
    pub(super) bias: Option<Arc<Delta>>,
}

impl Parts {
    /// How many tensors there are.
    pub(super) fn len(&self) -> usize {
        self.tensors.len()
    }

    pub(super) fn insert(&mut self, role: Role, source: &Source) -> Result<()> {
        let known = self.tensors.insert(role, source.clone());
        ensure!(
            known.is_none(),
            "the file has it twice, under two spellings or of two adapters"
        );
        Ok(())
    }

    fn get(&self, role: Role) -> Option<Source> {
        self.tensors.get(&role).cloned()
    }

    /// The two tensors `roles`, or none of them.
    fn pair(&self, roles: [Role; 2]) -> Result<Option<[Source; 2]>> {
        match roles.map(|role| self.get(role)) {
            [Some(one), Some(other)] => Ok(Some([one, other])),
            [None, None] => Ok(None),
            [one, _] => bail!(
                "has a factor {:?} without {:?}",
                roles[usize::from(one.is_none())],
                roles[usize::from(one.is_some())]
            ),
        }
    }

    /// The factor `whole`, or the product of `parts`.
    fn factor(&self, whole: Role, parts: [Role; 2]) -> Result<Option<Factor>> {
        if let Some(whole) = self.get(whole) {
            return Ok(Some(Factor::Whole(whole)));
        }
        let parts = self.pair(parts)?;
        Ok(parts.map(|[left, right]| Factor::Product(left, right)))
    }

    /// The factors of the weight, and their rank if the scale is alpha over it.
    fn form(&self) -> Result<Option<(DeltaForm, Option<usize>)>> {
        use Role::{
            Difference, Down, FirstA, FirstB, Left, LeftA, LeftB, Right, RightA, RightB, SecondA,
            SecondB, Up,
        };
        let height = |source: &Source| source.shape().first().copied();
        let mut found = Vec::new();
        if let Some([a, b]) = self.pair([Down, Up])? {
            let rank = height(&a);
            found.push((DeltaForm::LowRank { a, b }, rank));
        }
        let left = self.factor(Left, [LeftA, LeftB])?;
        let right = self.factor(Right, [RightA, RightB])?;
        match (left, right) {
            (Some(left), Some(right)) => {
                let of = |factor: &Factor| match factor {
                    Factor::Whole(_) => None,
                    Factor::Product(_, b) => height(b),
                };
                let rank = of(&right).or(of(&left));
                found.push((DeltaForm::Kronecker(left, right), rank));
            }
            (None, None) => {}
            _ => bail!("has one of LoKr's two factors only"),
        }
        match (self.pair([FirstA, FirstB])?, self.pair([SecondA, SecondB])?) {
            (Some([a, b]), Some([c, d])) => {
                let rank = height(&b);
                let (first, second) = (Factor::Product(a, b), Factor::Product(c, d));
                found.push((DeltaForm::Hadamard(first, second), rank));
            }
            (None, None) => {}
            _ => bail!("has one of LoHa's two products only"),
        }
        if let Some(change) = self.get(Difference) {
            found.push((DeltaForm::Difference(change), None));
        }
        ensure!(found.len() <= 1, "is stored in two forms at once");
        Ok(found.pop())
    }

    /// The changes that the module stands for. `module` is its name below all prefixes, for the adapter's configuration.
    ///
    /// # Errors
    /// When a factor is missing, or a number is not finite.
    pub(super) fn changes(
        &self,
        file: &str,
        id: &str,
        module: &str,
        weight: f32,
        config: &AdapterConfig,
    ) -> Result<Changes> {
        let form = self.form()?;
        let alpha = self
            .get(Role::Alpha)
            .map(|alpha| number(&alpha))
            .transpose()?;
        let scale = match &form {
            None | Some((DeltaForm::Difference(_), _)) => 1.0,
            Some((form, rank)) => match (alpha, rank) {
                (Some(alpha), Some(rank)) => alpha / *rank as f32,
                // LoKr of two whole factors has no rank
                (Some(_), None) => 1.0,
                (None, rank) => {
                    let ranked = matches!(form, DeltaForm::LowRank { .. });
                    config.scale(module, rank.filter(|_| ranked))?
                }
            },
        };
        let name = format!("`{file}`: `{module}`");
        let magnitude = |role: Role, share: f32| {
            let values = self.get(role)?;
            Some(Magnitude { values, share })
        };
        // PEFT scales the factors by the user's weight, others the change of the whole
        let magnitude =
            magnitude(Role::Magnitude, 1.0).or_else(|| magnitude(Role::DoraScale, weight));
        let of_factors = if self.tensors.contains_key(&Role::DoraScale) {
            1.0
        } else {
            weight
        };
        let delta = |part: &str, form: DeltaForm, scale: f32, magnitude: Option<Magnitude>| {
            Arc::new(Delta {
                name: name.clone(),
                id: format!("{id} {weight} {module} {part}"),
                form,
                scale,
                magnitude,
            })
        };
        ensure!(
            magnitude.is_none() || form.is_some(),
            "has DoRA's magnitudes without factors"
        );
        let bias = match (self.get(Role::UpBias), self.get(Role::BiasDifference)) {
            (Some(bias), None) => Some((bias, scale)),
            (None, Some(bias)) => Some((bias, 1.0)),
            (None, None) => None,
            (Some(_), Some(_)) => bail!("changes the bias twice"),
        };
        ensure!(
            form.is_some() || bias.is_some(),
            "has a scale but no factors"
        );
        Ok(Changes {
            weight: form.map(|(form, _)| delta("weight", form, scale * of_factors, magnitude)),
            bias: bias.map(|(bias, scale)| {
                delta("bias", DeltaForm::Difference(bias), scale * weight, None)
            }),
        })
    }
}

/// The one number of a tensor.
fn number(source: &Source) -> Result<f32> {
    ensure!(
        source.elements() == 1,
        "has an alpha of shape {:?}, expected one number",
        source.shape()
    );
    let value = match source.format() {
        format if format.is_float() => source.values(0..1)?.first().copied(),
        _ => {
            let tensor = source.tensor(&candle::Device::Cpu)?;
            let tensor = tensor.to_dtype(candle::DType::F32)?.flatten_all()?;
            tensor.to_vec1::<f32>()?.first().copied()
        }
    };
    let value = value.context("has an empty alpha")?;
    ensure!(value.is_finite(), "has an alpha that is NaN or infinite");
    Ok(value)
}

/// The tensors of a file by module, and the names that are of no LoRA.
///
/// # Errors
/// When a tensor holds no numbers, or is there twice.
pub(super) fn modules(file: &Checkpoint) -> Result<(BTreeMap<String, Parts>, Vec<String>)> {
    let (mut modules, mut unknown) = (BTreeMap::<String, Parts>::new(), Vec::new());
    for (name, source) in file.iter() {
        let Some((module, role)) = split(name) else {
            unknown.push(name.to_owned());
            continue;
        };
        if role != Role::Alpha {
            file.expect_floats(name)?;
        }
        ensure!(
            source.elements() > 0,
            "`{}`: tensor `{name}` of shape {:?} is empty\nhint: the file is damaged, or its rank was reduced to 0",
            file.name,
            source.shape()
        );
        let parts = modules.entry(module.to_owned()).or_default();
        parts
            .insert(role, source)
            .with_context(|| format!("`{}`: tensor `{name}`", file.name))?;
    }
    Ok((modules, unknown))
}

/// The JSON in a file's metadata under `key`.
///
/// # Errors
/// When it is damaged.
pub(super) fn metadata_json(file: &Checkpoint, key: &str) -> Result<Option<Value>> {
    let Some(text) = file.metadata.get(key) else {
        return Ok(None);
    };
    let json = serde_json::from_str(text);
    json.with_context(|| format!("`{}`: its metadata `{key}` is damaged", file.name))
        .map(Some)
}
