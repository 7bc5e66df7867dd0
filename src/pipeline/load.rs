//! Loads the components of a pipeline onto the device, with progress and errors that name files.

use std::path::PathBuf;
use std::sync::{Mutex, Once, PoisonError};

use anyhow::{Context, Result, ensure};
use candle::{Device, Tensor};

use super::{Pipeline, VaeFiles};
use crate::{
    device::{self, Runtime},
    layout::Family,
    model::{Flux, ops},
    sample::{
        encoded::{Encoded, NegativePrompt, References, placed},
        image,
        png::Image,
        reference,
        schedule::Schedule,
        text::{TextEncoders, TextFiles},
        vae::Vae,
    },
    ui::{self, Reporter},
};

/// Prompts in one call of the text encoders.
const PROMPTS_PER_CALL: usize = 32;

/// The transformer in the runtime's format on its device.
pub fn flux(pipeline: &Pipeline, runtime: &Runtime) -> Result<Flux> {
    check_kernels(runtime, &pipeline.reporter);
    let vb = pipeline
        .transformer
        .var_builder(runtime.dtype, &runtime.device);
    Flux::new(&pipeline.config, vb)
        .with_context(|| format!("cannot load the transformer of `{}`", pipeline.name))
}

/// Says once if a GPU or its kernels are not used: results are the same, slower. To be asked again after work whose kernels
/// are compiled when they are first needed.
pub fn check_kernels(runtime: &Runtime, reporter: &Reporter) {
    static ASKED: Once = Once::new();
    static SAID: Mutex<Option<String>> = Mutex::new(None);
    ASKED.call_once(|| {
        if let Some(why) = device::unused_gpu() {
            reporter.warn(format!(
                "computing on the CPU, as the GPU cannot be used: {why}\nhint: see `nvidia-smi`; --device cpu says that this is wanted"
            ));
        }
    });
    let why = ops::trouble(&runtime.device);
    let mut said = SAID.lock().unwrap_or_else(PoisonError::into_inner);
    if why.is_some() && *said != why {
        reporter.warn(format!(
            "slower than it could be, without our CUDA kernels: {}",
            why.as_deref().unwrap_or_default()
        ));
        *said = why;
    }
}

/// The scheduler.
pub fn schedule(pipeline: &Pipeline) -> Result<Schedule> {
    let schedule = Schedule::from_json(pipeline.scheduler.to_string().as_bytes())
        .with_context(|| pipeline.scheduler_name.clone())?;
    Ok(schedule.with_rule(pipeline.config.family.shift))
}

/// The text encoders and their tokenizers; `length` is that of the text in tokens, by default the model's.
pub fn text_encoders(
    pipeline: &Pipeline,
    files: &TextFiles,
    length: Option<usize>,
    runtime: &Runtime,
) -> Result<TextEncoders> {
    // what is drawn with the prompts needs it, and encoding them takes a while
    schedule(pipeline)?;
    TextEncoders::load(
        pipeline.config.family.text,
        files,
        Some([pipeline.config.context_in_dim, pipeline.config.vec_in_dim]),
        &pipeline.text_lora,
        length,
        pipeline.default_text_length()?,
        runtime.dtype,
        &runtime.device,
    )
}

/// Encodes prompts, and the negative prompt of a model that takes one, a bounded number at a time; on the CPU, as those of
/// a calibration are half a gigabyte.
pub fn encode(pipeline: &Pipeline, encoders: &TextEncoders, prompts: &[String]) -> Result<Encoded> {
    let progress = pipeline
        .reporter
        .progress(prompts.len(), "encoding prompts");
    let (mut txt, mut vec) = (Vec::new(), Vec::new());
    for chunk in prompts.chunks(PROMPTS_PER_CALL) {
        let encoded = encoders.encode(chunk)?.to_device(&Device::Cpu)?;
        txt.push(encoded.txt);
        vec.push(encoded.vec);
        progress.inc(chunk.len() as u64);
    }
    let mut encoded = Encoded::new(Tensor::cat(&txt, 0)?, Tensor::cat(&vec, 0)?);
    if pipeline.takes_negative_prompt() {
        let negative = encoders.encode(std::slice::from_ref(&pipeline.negative_prompt))?;
        encoded.negative = Some(NegativePrompt {
            txt: negative.txt.to_device(&Device::Cpu)?,
            vec: placed(&negative.vec, &Device::Cpu, negative.vec.dtype())?,
        });
    }
    progress.finish_and_clear();
    Ok(encoded)
}

/// Loads the text encoders, encodes prompts and frees the encoders again.
pub fn encode_prompts(
    pipeline: &Pipeline,
    prompts: &[String],
    length: Option<usize>,
    runtime: &Runtime,
) -> Result<Encoded> {
    let encoders = text_encoders(pipeline, &pipeline.text_files()?, length, runtime)?;
    let encoded = encode(pipeline, &encoders, prompts)?;
    for (name, cut) in encoders.cut(prompts)? {
        if cut.prompts > 0 {
            let which = match prompts.len() {
                1 => "the prompt is".to_owned(),
                all => format!("{} of {all} prompts are", cut.prompts),
            };
            pipeline.reporter.note(format!(
                "{which} longer than the {} tokens that {name} reads: what follows is cut off",
                cut.length
            ));
        }
    }
    drop(encoders);
    pipeline.reporter.note(format!(
        "encoded {} and freed the text encoders",
        ui::counted(prompts.len(), "prompt")
    ));
    Ok(encoded)
}

/// The reference images in these files, at the sizes that the model sees them in.
///
/// # Errors
/// When they are more than the model takes, cannot be read, or are too small; the message names `--image`.
pub fn reference_images(pipeline: &Pipeline, paths: &[PathBuf]) -> Result<Vec<Image>> {
    pipeline.check_references(paths.len())?;
    let family = &pipeline.config.family;
    ensure!(
        paths.len() <= 1 || *family == Family::FLUX2,
        "--image: `{}` takes one reference image, {} are given",
        pipeline.name,
        paths.len()
    );
    let read = |path: &PathBuf| {
        let image = reference::prepared(&image::read(path)?, family);
        image.with_context(|| format!("`{}`", path.display()))
    };
    let images = paths.iter().map(read).collect::<Result<_>>();
    images.context("--image")
}

/// Reference images at the sizes that the model sees them in, as tokens, which all prompts share; loads the VAE and frees
/// it again.
pub fn references(pipeline: &Pipeline, images: &[Image], runtime: &Runtime) -> Result<References> {
    let vae = vae(&pipeline.vae_files()?, runtime)?;
    let family = &pipeline.config.family;
    reference::encode(&vae, images, family, &runtime.device)
}

/// The VAE.
pub fn vae(files: &VaeFiles, runtime: &Runtime) -> Result<Vae> {
    match files {
        VaeFiles::Folder(folder) => Vae::load_folder(folder, runtime.dtype, &runtime.device),
        VaeFiles::Weights(file) => Vae::load_weights(file, runtime.dtype, &runtime.device),
    }
}
