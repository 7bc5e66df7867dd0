//! Images for the field's own scorers: drawn from a suite's prompt files and laid out as its scorer reads them. Images that
//! are there are not drawn again, so a killed run goes on; shards draw every n-th prompt.

use std::{fs, path::Path, time::Duration};

use anyhow::{Context, Result};
use serde::Serialize;

use super::suites::Entry;
pub use super::suites::Suite;
use crate::{
    calibrate::pass::Shard,
    checkpoint::{output, record},
    pipeline::{
        Pipeline,
        generate::{self, ImageJob},
        load,
        placement::MemoryBudget,
    },
    sample::{png::Image, size::ImageSize},
    ui,
};

/// Images whose latents are held at once: what a killed run loses at most.
const IMAGES_AT_ONCE: usize = 64;

/// How images are drawn.
#[derive(Clone, Copy, Debug)]
pub struct ExportOptions {
    /// Which suite.
    pub suite: Suite,
    /// Which part of its prompts.
    pub shard: Shard,
    /// Size of an image.
    pub size: ImageSize,
    /// Sampling steps.
    pub steps: usize,
    /// Guidance scale.
    pub guidance: f64,
    /// Seed of every prompt's images.
    pub seed: u64,
    /// Rows of pixels to decode at a time.
    pub vae_tile: Option<usize>,
}

/// What was drawn, next to the images in `FOLDER.json`.
#[derive(Clone, Debug, Serialize)]
pub struct ExportReport {
    /// Which suite.
    pub suite: Suite,
    /// How the model is called.
    pub model: String,
    /// Its fingerprint.
    pub fingerprint: String,
    /// The folder.
    pub output: String,
    /// Prompts of the shard, and of the suite.
    pub prompts: [usize; 2],
    /// Prompts whose images were there.
    pub there: usize,
    /// Images of a prompt: the first ones of the noise of the seed.
    pub images_per_prompt: usize,
    /// Seed of every prompt's images.
    pub seed: u64,
    /// Sampling steps.
    pub steps: usize,
    /// Guidance scale.
    pub guidance: f64,
    /// Width and height.
    pub size: [usize; 2],
    /// What scores the folder.
    pub scorer: String,
}

impl ExportReport {
    /// For people.
    pub fn text(&self) -> String {
        format!(
            "{} of {} of {} in `{}`, {} of them were there\nscore them with: {}",
            self.prompts[0],
            ui::counted(self.prompts[1], "prompt"),
            self.suite,
            self.output,
            self.there,
            self.scorer
        )
    }
}

/// Draws what is missing of a suite's images into the folder `output`.
///
/// # Errors
/// When prompts cannot be read, the model cannot draw, or the disk is full.
pub fn run(
    pipeline: &Pipeline,
    budget: &MemoryBudget,
    prompts: &Path,
    output: &Path,
    options: &ExportOptions,
) -> Result<ExportReport> {
    let suite = options.suite;
    let all = suite.read(prompts)?;
    let Shard { index, of } = options.shard;
    let of_shard: Vec<&Entry> = all.iter().skip(index - 1).step_by(of).collect();
    let missing: Vec<&Entry> = of_shard
        .iter()
        .copied()
        .filter(|entry| !suite.is_done(&output.join(&entry.place)))
        .collect();
    let report = ExportReport {
        suite,
        model: pipeline.name.clone(),
        fingerprint: record::fingerprint(&pipeline.transformer)?,
        output: output.display().to_string(),
        prompts: [of_shard.len(), all.len()],
        there: of_shard.len() - missing.len(),
        images_per_prompt: suite.images_per_prompt(),
        seed: options.seed,
        steps: options.steps,
        guidance: options.guidance,
        size: [options.size.width, options.size.height],
        scorer: suite.scorer(&output.display().to_string(), options.size),
    };
    for part in missing.chunks((IMAGES_AT_ONCE / suite.images_per_prompt()).max(1)) {
        draw(pipeline, budget, part, output, options)?;
    }
    let name = output.file_name().unwrap_or_default().to_string_lossy();
    let name = match of {
        1 => format!("{name}.json"),
        _ => format!("{name}.{index}-of-{of}.json"),
    };
    // not in the folder: DPG's scorer takes every file there for an image
    output::write_json(
        &output.with_file_name(name),
        &serde_json::to_value(&report)?,
    )?;
    Ok(report)
}

fn draw(
    pipeline: &Pipeline,
    budget: &MemoryBudget,
    entries: &[&Entry],
    output: &Path,
    options: &ExportOptions,
) -> Result<()> {
    let per_prompt = options.suite.images_per_prompt();
    let prompts: Vec<String> = entries.iter().map(|entry| entry.prompt.clone()).collect();
    let mut jobs = Vec::new();
    for (prompt_index, entry) in entries.iter().enumerate() {
        for image_index in 0..per_prompt {
            jobs.push(ImageJob {
                path: output.join(&entry.place),
                prompt: entry.prompt.clone(),
                seed: options.seed,
                steps: options.steps,
                guidance: pipeline.takes_guidance().then_some(options.guidance),
                true_cfg: pipeline.shown_true_cfg(Some(options.guidance)),
                width: options.size.width,
                height: options.size.height,
                prompt_index,
                image_index,
            });
        }
    }
    let encoded = load::encode_prompts(pipeline, &prompts, None, budget.runtime())?;
    let latents = generate::latents(
        pipeline,
        budget,
        &jobs,
        &encoded,
        options.size,
        Duration::MAX,
    )?;
    let decoder = budget.decoder(
        &pipeline.vae_files()?,
        options.size.latent(pipeline.config.family),
        options.vae_tile,
    )?;
    for (i, entry) in entries.iter().enumerate() {
        let images = decoder.images(&latents.narrow(0, i * per_prompt, per_prompt)?)?;
        write(
            options,
            entry,
            &images,
            &output.join(&entry.place),
            pipeline,
        )?;
    }
    Ok(())
}

fn write(
    options: &ExportOptions,
    entry: &Entry,
    images: &[Image],
    place: &Path,
    pipeline: &Pipeline,
) -> Result<()> {
    let folder = match options.suite {
        Suite::GenEval => place.join("samples"),
        Suite::Dpg | Suite::HpsV2 => place.parent().unwrap_or(place).to_path_buf(),
    };
    fs::create_dir_all(&folder).with_context(|| format!("cannot create `{}`", folder.display()))?;
    let seed = options.seed.to_string();
    let save = |image: &Image, path: &Path, index: &str| {
        let text = [
            ("prompt", entry.prompt.as_str()),
            ("seed", &seed),
            ("image", index),
            ("model", &pipeline.model_ref),
            ("Software", &record::software()),
        ];
        image.save(path, &text)
    };
    match options.suite {
        Suite::GenEval => {
            if let Some(line) = &entry.line {
                crate::checkpoint::save::write_bytes(
                    &place.join("metadata.jsonl"),
                    line.as_bytes(),
                )?;
            }
            for (i, image) in images.iter().enumerate() {
                save(image, &folder.join(format!("{i:04}.png")), &i.to_string())?;
            }
            Ok(())
        }
        Suite::Dpg => save(&two_by_two(images)?, place, "0 to 3"),
        Suite::HpsV2 => save(images.first().context("no image was drawn")?, place, "0"),
    }
}

/// Four images in one, without a margin: the scorer cuts it into quarters.
fn two_by_two(images: &[Image]) -> Result<Image> {
    let [a, b, c, d] = images else {
        anyhow::bail!("{} images instead of four", images.len())
    };
    let (width, height) = (a.width, a.height);
    let line = 3 * width as usize;
    let mut rgb = Vec::with_capacity(4 * a.rgb.len());
    for [left, right] in [[a, b], [c, d]] {
        for (left, right) in left
            .rgb
            .chunks_exact(line)
            .zip(right.rgb.chunks_exact(line))
        {
            rgb.extend_from_slice(left);
            rgb.extend_from_slice(right);
        }
    }
    Ok(Image {
        width: 2 * width,
        height: 2 * height,
        rgb,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quarters_lie_in_reading_order() {
        let of = |v: u8| Image {
            width: 1,
            height: 1,
            rgb: vec![v; 3],
        };
        let all = two_by_two(&[of(1), of(2), of(3), of(4)]).unwrap();
        let first: Vec<u8> = all.rgb.chunks(3).map(|p| p[0]).collect();
        assert_eq!(((all.width, all.height), first), ((2, 2), vec![1, 2, 3, 4]));
    }
}
