//! A CLIP model: prompts and images → embeddings, and the score of a pair.

use anyhow::{Context, Result};
use candle::{D, DType, Device, Tensor};
use serde_json::Value;

use super::{
    pixels::Preparation,
    vision::{Vision, VisionConfig},
};
use crate::{
    checkpoint::Checkpoint,
    files::Files,
    sample::{png::Image, text::ClipText},
};

/// Images in one forward.
const AT_ONCE: usize = 16;

/// Both halves of a CLIP model.
#[derive(Debug)]
pub struct ClipModel {
    text: ClipText,
    vision: Vision,
    preparation: Preparation,
    /// (embedding, text hidden)
    text_projection: Tensor,
    /// (embedding, vision hidden)
    visual_projection: Tensor,
    device: Device,
}

impl ClipModel {
    /// Opens a folder or hub repository in transformers layout: `config.json`, `model.safetensors`, the tokenizer's files
    /// and, if there is one, `preprocessor_config.json`. Computes in f32.
    ///
    /// # Errors
    /// When files are missing or damaged, or a tensor has another shape than the config says; the message names it.
    pub fn open(files: &Files, device: &Device) -> Result<Self> {
        let config = files.json("config.json")?.with_context(|| {
            format!(
                "`{}` does not exist\nhint: --clip takes a CLIP in transformers layout, such as openai/clip-vit-large-patch14",
                files.describe("config.json")
            )
        })?;
        let checkpoint = Checkpoint::open(files, "model")?;
        let name = || format!("`{}`", files.model_ref());
        let vision: VisionConfig =
            serde_json::from_value(config.get("vision_config").cloned().unwrap_or_default())
                .with_context(|| files.describe("config.json"))?;
        let preparation = match files.json("preprocessor_config.json")? {
            Some(json) => serde_json::from_value(json)
                .with_context(|| files.describe("preprocessor_config.json"))?,
            None => Preparation::default(),
        };
        let text_config: Value = config.get("text_config").cloned().unwrap_or_default();
        let text = ClipText::open(files, &text_config, &checkpoint, device)?;
        let vb = checkpoint.var_builder(DType::F32, device);
        let projection = |tensor: &str, hidden: usize| -> Result<Tensor> {
            let [embedding, _] = checkpoint.dims(tensor)?;
            Ok(vb.get((embedding, hidden), tensor)?)
        };
        Ok(Self {
            text_projection: projection("text_projection.weight", text.width())?,
            visual_projection: projection("visual_projection.weight", vision.hidden_size)?,
            vision: Vision::new(&vision, &vb.pp("vision_model")).with_context(name)?,
            text,
            preparation,
            device: device.clone(),
        })
    }

    /// Embeddings of prompts, (prompts, embedding), of length 1.
    ///
    /// # Errors
    /// When a token has no embedding, or memory is short.
    pub fn texts(&self, prompts: &[String]) -> Result<Tensor> {
        let mut out = Vec::new();
        for prompts in prompts.chunks(AT_ONCE) {
            let pooled = self.text.pooled(prompts)?;
            out.push(unit(&pooled.matmul(&self.text_projection.t()?)?)?);
        }
        Ok(Tensor::cat(&out, 0)?)
    }

    /// Embeddings of images, (images, embedding), of length 1.
    ///
    /// # Errors
    /// When an image is empty, or memory is short.
    pub fn images(&self, images: &[Image]) -> Result<Tensor> {
        let mut out = Vec::new();
        for images in images.chunks(AT_ONCE) {
            let pixels = images
                .iter()
                .map(|image| self.preparation.pixels(image, self.vision.side()));
            let pixels = Tensor::stack(&pixels.collect::<Result<Vec<_>>>()?, 0)?;
            let pooled = self.vision.pooled(&pixels.to_device(&self.device)?)?;
            out.push(unit(&pooled.matmul(&self.visual_projection.t()?)?)?);
        }
        Ok(Tensor::cat(&out, 0)?)
    }

    /// 100 · cosine of each image and the prompt in the same row of `texts`.
    ///
    /// # Errors
    /// When there are as many of one as of the other.
    pub fn scores(&self, texts: &Tensor, images: &[Image]) -> Result<Vec<f64>> {
        let cosines = (self.images(images)? * texts)?.sum(D::Minus1)?;
        let cosines: Vec<f32> = cosines.to_vec1()?;
        Ok(cosines.into_iter().map(|c| 100.0 * f64::from(c)).collect())
    }
}

fn unit(x: &Tensor) -> Result<Tensor> {
    Ok(x.broadcast_div(&x.sqr()?.sum_keepdim(D::Minus1)?.sqrt()?)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn golden() -> (Files, Checkpoint) {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/clip");
        let files = Files::folder(folder);
        let recorded = Checkpoint::open(&files, "reference").unwrap();
        (files, recorded)
    }

    fn recorded_images(recorded: &Checkpoint) -> Vec<Image> {
        let names = (0..).map(|i| format!("image.{i}"));
        let found = names.map_while(|name| recorded.get(&name));
        let image = |source: &crate::checkpoint::Source| Image {
            height: source.shape()[0] as u32,
            width: source.shape()[1] as u32,
            rgb: source.bytes().unwrap().into_owned(),
        };
        found.map(image).collect()
    }

    fn far(a: &Tensor, b: &Tensor) -> f32 {
        assert_eq!(a.dims(), b.dims());
        let far = (a - b).unwrap().abs().unwrap().flatten_all().unwrap();
        far.max(0).unwrap().to_scalar().unwrap()
    }

    #[test]
    fn images_are_prepared_as_pillow_does() {
        let (files, recorded) = golden();
        let model = ClipModel::open(&files, &Device::Cpu).unwrap();
        let want = recorded.expect("pixels").unwrap();
        let want = want.tensor(&Device::Cpu).unwrap();
        let images = recorded_images(&recorded);
        assert_eq!(images.len(), 4);
        for (i, image) in images.iter().enumerate() {
            let got = model.preparation.pixels(image, 48).unwrap();
            // one step of 255 would be 0.014
            let far = far(&got, &want.get(i).unwrap());
            assert!(far <= 1e-6, "image {i}: {far}");
        }
    }

    #[test]
    fn embeddings_are_those_of_transformers() {
        let (files, recorded) = golden();
        let model = ClipModel::open(&files, &Device::Cpu).unwrap();
        let get = |name: &str| recorded.expect(name).unwrap().tensor(&Device::Cpu).unwrap();
        let prompts: Vec<String> = serde_json::from_str(&recorded.metadata["prompts"]).unwrap();
        let texts = model.texts(&prompts).unwrap();
        assert!(far(&texts, &get("text")) <= 1e-5);
        let images = recorded_images(&recorded);
        let image = model.images(&images).unwrap();
        assert!(far(&image, &get("image")) <= 1e-5);
        let scores = model.scores(&texts, &images[..3]).unwrap();
        let want = (get("image").narrow(0, 0, 3).unwrap() * get("text")).unwrap();
        let want: Vec<f32> = want.sum(1).unwrap().to_vec1().unwrap();
        for (score, want) in scores.iter().zip(want) {
            assert!((score - 100.0 * f64::from(want)).abs() < 2e-3);
        }
        assert!((scores[0] - scores[1]).abs() > 0.1);
    }

    #[test]
    fn a_folder_that_is_no_clip_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let error = ClipModel::open(&Files::folder(folder.path()), &Device::Cpu).unwrap_err();
        assert!(format!("{error:#}").contains("config.json"), "{error:#}");
    }
}
