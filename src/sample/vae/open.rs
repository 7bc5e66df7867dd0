//! Opens an autoencoder from a folder in diffusers layout or from one file, with diffusers' or original names.

use anyhow::{Context as _, Result, bail, ensure};
use candle::{DType, Device};

use super::{Vae, VaeConfig, keys};
use crate::checkpoint::{Checkpoint, is_weights, part::Part, with_hint};
use crate::files::Files;

/// What to do about a file that is of no use.
const OTHERS: &str = "name another with --vae";

/// An autoencoder's tensors under diffusers' names, and its sizes; no weight is read.
struct Opened {
    tensors: Checkpoint,
    config: VaeConfig,
}

impl Opened {
    /// `diffusion_pytorch_model.safetensors` with `config.json`, or the only file of weights in a folder.
    fn folder(files: &Files) -> Result<Self> {
        let raw = Checkpoint::open_if_present(files, "diffusion_pytorch_model");
        let raw = match with_hint(raw, OTHERS)? {
            Some(raw) => raw,
            None => only_file(files)?,
        };
        let config = files.get("config.json")?;
        let config = config
            .map(|blob| VaeConfig::from_json(&blob))
            .transpose()
            .with_context(|| files.describe("config.json"))?;
        Self::new(&raw, config)
    }

    fn new(raw: &Checkpoint, config: Option<VaeConfig>) -> Result<Self> {
        let prefixes = Part::Vae.prefixes(raw);
        let prefix = match prefixes.as_slice() {
            [one] => one,
            [] => bail!(
                "`{}` holds no VAE: there is no tensor `decoder.conv_in.weight`\nhint: {OTHERS}",
                raw.name
            ),
            many => bail!(
                "`{}` holds several VAEs ({})\nhint: {OTHERS}",
                raw.name,
                many.join(", ")
            ),
        };
        let own = Part::Vae.take(raw, prefix)?;
        let tensors = if keys::is_original(own.names()) {
            let levels = keys::levels(own.names());
            own.rename(|name| keys::to_diffusers(name, levels))?
        } else {
            own
        };
        for name in tensors.names() {
            tensors.expect_floats(name)?;
        }
        let config = match config {
            Some(config) => config,
            None => keys::infer_config(|name| Some(tensors.get(name)?.shape().to_vec()))
                .with_context(|| format!("`{}`", raw.name))?,
        };
        Ok(Self { tensors, config })
    }

    fn load(&self, dtype: DType, device: &Device) -> Result<Vae> {
        // half-precision convolutions on the CPU are slow, and float16 overflows in this network
        let dtype = if device.is_cpu() || dtype == DType::F16 {
            DType::F32
        } else {
            dtype
        };
        let name = &self.tensors.name;
        let mut vae = Vae::new(&self.config, &self.tensors.var_builder(dtype, device))
            .with_context(|| format!("cannot load the VAE `{name}`"))?;
        vae.name.clone_from(name);
        Ok(vae)
    }
}

impl Vae {
    /// Opens `diffusion_pytorch_model.safetensors` with `config.json`, or the only file of weights in a folder.
    ///
    /// # Errors
    /// When files are missing or damaged, or shapes contradict the config; the message names the file.
    pub fn load_folder(files: &Files, dtype: DType, device: &Device) -> Result<Self> {
        Opened::folder(files)?.load(dtype, device)
    }

    /// Opens one file, such as `ae.safetensors` or a file of a whole pipeline; sizes come from its tensors.
    ///
    /// # Errors
    /// When it holds no autoencoder like those of FLUX.1 and FLUX.2.
    pub fn load_weights(file: &Checkpoint, dtype: DType, device: &Device) -> Result<Self> {
        Opened::new(file, None)?.load(dtype, device)
    }

    /// The sizes of the autoencoder in a folder or in one file, from headers alone.
    ///
    /// # Errors
    /// As [`Self::load_folder`] and [`Self::load_weights`].
    pub fn sizes(folder: Result<&Files, &Checkpoint>) -> Result<VaeConfig> {
        let opened = match folder {
            Ok(files) => Opened::folder(files)?,
            Err(file) => Opened::new(file, None)?,
        };
        let name = &opened.tensors.name;
        ensure!(
            opened.tensors.contains("decoder.conv_out.weight"),
            "`{name}`: the VAE lacks the tensor `decoder.conv_out.weight`\nhint: {OTHERS}"
        );
        Ok(opened.config)
    }
}

fn only_file(files: &Files) -> Result<Checkpoint> {
    let names = files.list()?;
    let weights: Vec<String> = names.into_iter().filter(|name| is_weights(name)).collect();
    let open = |name: &str| {
        let opened = files
            .read(name)
            .and_then(|blob| Checkpoint::from_blob(&files.describe(name), &blob));
        with_hint(opened, OTHERS)
    };
    if let [one] = weights.as_slice() {
        return open(one);
    }
    let mut found = Vec::new();
    for name in &weights {
        // another file may hold what is looked for
        found.extend(open(name).ok().filter(|file| Part::Vae.is_in(file)));
    }
    match found.len() {
        1 => Ok(found.remove(0)),
        0 => bail!(
            "`{}` holds no VAE: there is no file with a tensor `decoder.conv_in.weight`\nhint: {OTHERS}",
            files.model_ref()
        ),
        _ => bail!(
            "`{}` holds several VAEs ({}); name one of them",
            files.model_ref(),
            found
                .iter()
                .map(|file| file.name.as_str())
                .collect::<Vec<_>>()
                .join(", ")
        ),
    }
}
