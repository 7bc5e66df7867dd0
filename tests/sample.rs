//! Tokenizers, text encoders, VAE and noise against recordings from transformers, diffusers and torch.

use std::collections::HashMap;
use std::path::PathBuf;

use anyhow::{Context as _, Result};
use candle::{DType, Device, Tensor};
use fastflux::checkpoint::Checkpoint;
use fastflux::files::{Blob, Files};
use fastflux::layout::TextModel;
use fastflux::sample::encoded::Encoded;
use fastflux::sample::noise::Generator;
use fastflux::sample::text::{Cut, TextEncoders};
use fastflux::sample::tokenize::{Family, PromptTokenizer, TokenizerFiles};
use fastflux::sample::vae::{Vae, keys};

fn path(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(name)
}

fn golden(name: &str) -> Result<HashMap<String, Tensor>> {
    let path = path("tests/golden").join(name);
    candle::safetensors::load(&path, &Device::Cpu).with_context(|| path.display().to_string())
}

/// ‖a − b‖ / ‖b‖
fn relative(a: &Tensor, b: &Tensor) -> Result<f64> {
    assert_eq!(a.dims(), b.dims());
    let (a, b) = (a.to_dtype(DType::F64)?, b.to_dtype(DType::F64)?);
    let norm = |t: &Tensor| anyhow::Ok(t.sqr()?.sum_all()?.to_scalar::<f64>()?.sqrt());
    Ok(norm(&(a - &b)?)? / norm(&b)?)
}

fn encoders(name: &str, length: Option<usize>) -> Result<TextEncoders> {
    let files = Files::folder(path("tests/golden").join(name).join("pipe"));
    TextEncoders::load(
        TextModel::ClipAndT5,
        &files.into(),
        None,
        &[],
        length,
        512,
        DType::F32,
        &Device::Cpu,
    )
}

fn prompts() -> Result<Vec<String>> {
    let bytes = std::fs::read(path("tests/golden/sample.safetensors"))?;
    let (_, header) = safetensors::SafeTensors::read_metadata(&bytes)?;
    let metadata = header.metadata().as_ref().context("no metadata")?;
    Ok(serde_json::from_str(&metadata["prompts"])?)
}

#[test]
fn prompts_that_are_too_long_are_counted() -> Result<()> {
    let encoders = TextEncoders::load(
        TextModel::ClipAndT5,
        &Files::bundled().into(),
        None,
        &[],
        None,
        12,
        DType::F32,
        &Device::Cpu,
    )?;
    let cut = |prompts: &[String]| -> Result<[usize; 2]> {
        let cut = encoders.cut(prompts)?;
        Ok([cut[0].1.prompts, cut[1].1.prompts])
    };
    let known: Vec<String> = std::fs::read_to_string(path("configs/tiny/prompts.txt"))?
        .lines()
        .map(str::to_owned)
        .collect();
    assert_eq!(cut(&known)?, [0, 0], "the model's own captions");
    let words = |count: usize| vec!["red"; count].join(" ");
    // T5 reads 12 tokens with the end token, CLIP 14 with start and end
    let found = encoders.cut(&[words(12), words(13), words(14)])?;
    let expected = [("CLIP", 1, 14), ("T5", 2, 12)];
    let expected = expected.map(|(name, prompts, length)| (name, Cut { prompts, length }));
    assert_eq!(found, expected);
    Ok(())
}

#[test]
fn flux1_tokenizers_give_transformers_ids() -> Result<()> {
    let read = |name: &str| std::fs::read(path("configs/flux1").join(name));
    let (vocab, merges) = (read("tokenizer/vocab.json")?, read("tokenizer/merges.txt")?);
    let (config, map) = (
        read("tokenizer/tokenizer_config.json")?,
        read("tokenizer/special_tokens_map.json")?,
    );
    let files = TokenizerFiles {
        vocab: Some(&vocab),
        merges: Some(&merges),
        config: Some(&config),
        special_tokens_map: Some(&map),
        ..TokenizerFiles::default()
    };
    let clip = PromptTokenizer::new(Family::Clip, &files)?;
    let (json, config) = (
        read("tokenizer_2/tokenizer.json")?,
        read("tokenizer_2/tokenizer_config.json")?,
    );
    let files = TokenizerFiles {
        tokenizer: Some(&json),
        config: Some(&config),
        ..TokenizerFiles::default()
    };
    let t5 = PromptTokenizer::new(Family::T5, &files)?;
    assert_eq!(
        (clip.model_max_length(), t5.model_max_length()),
        (Some(77), Some(512))
    );

    let rows: Vec<serde_json::Value> =
        serde_json::from_slice(&std::fs::read(path("tests/golden/tokenizer_ids.json"))?)?;
    assert!(rows.len() > 40);
    for row in rows {
        let text = row["text"].as_str().context("text")?;
        let ids = |key: &str| serde_json::from_value::<Vec<u32>>(row[key].clone());
        assert_eq!(clip.encode(text, 77)?, ids("clip")?, "CLIP: {text:?}");
        assert_eq!(t5.encode(text, 64)?, ids("t5")?, "T5: {text:?}");
    }
    Ok(())
}

#[test]
fn qwens_tokenizer_gives_transformers_ids() -> Result<()> {
    let read = |name: &str| std::fs::read(path("tests/golden/flux2").join(name));
    let (json, config) = (
        read("pipe/tokenizer/tokenizer.json")?,
        read("pipe/tokenizer/tokenizer_config.json")?,
    );
    let files = TokenizerFiles {
        tokenizer: Some(&json),
        config: Some(&config),
        ..TokenizerFiles::default()
    };
    let tokenizer = PromptTokenizer::new(Family::Qwen2, &files)?;
    let rows: Vec<serde_json::Value> = serde_json::from_slice(&read("qwen_ids.json")?)?;
    assert!(rows.len() > 5);
    for row in rows {
        let text = row["text"].as_str().context("text")?;
        let chat = format!(
            "<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
        );
        let ids: Vec<u32> = serde_json::from_value(row["ids"].clone())?;
        let (found, real) = tokenizer.encode_padded(&chat, 48)?;
        assert_eq!(found, ids, "{text:?}");
        let count = tokenizer.token_count(&chat)?.min(48);
        assert_eq!(real, 0..count, "{text:?}");
    }
    Ok(())
}

#[test]
fn text_encoders_give_transformers_numbers() -> Result<()> {
    let expected = golden("sample.safetensors")?;
    for name in ["dev", "schnell"] {
        let encoders = encoders(name, None)?;
        let Encoded { txt, vec, .. } = encoders.encode(&prompts()?)?;
        let (t5, clip) = (
            &expected[&format!("{name}.t5.hidden")],
            &expected[&format!("{name}.clip.pooled")],
        );
        let errors = (relative(&txt, t5)?, relative(&vec, clip)?);
        assert!(errors.0 <= 1e-5 && errors.1 <= 1e-5, "{name}: {errors:?}");
        let files = Files::folder(path("tests/golden").join(name).join("pipe")).into();
        TextEncoders::check(TextModel::ClipAndT5, &files, [t5.dim(2)?, clip.dim(1)?])?;
        let error = TextEncoders::check(TextModel::ClipAndT5, &files, [4096, 768])
            .unwrap_err()
            .to_string();
        assert!(error.contains("--text-encoders"), "{error}");
    }
    Ok(())
}

#[test]
fn the_text_length_is_the_given_one_or_the_smaller_of_default_and_limit() -> Result<()> {
    let limited = encoders("dev", None)?;
    assert_eq!(limited.text_length(), 16, "the tokenizer's own limit");
    let given = encoders("dev", Some(30))?;
    assert_eq!(
        given.encode(&["a house".to_owned()])?.txt.dims(),
        [1, 30, 40]
    );
    let none = encoders("dev", Some(0))?;
    let error = format!("{:#}", none.encode(&["a house".to_owned()]).unwrap_err());
    assert!(error.contains("text length of 0"), "{error}");
    assert!(limited.encode(&[]).is_err());
    Ok(())
}

#[test]
fn text_encoders_as_single_files_need_no_config_and_no_tokenizer() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let zeros = |shape: &[usize]| Tensor::zeros(shape, DType::BF16, &Device::Cpu);
    // ComfyUI's names, FLUX.1's vocabularies, hardly any width
    let mut clip = HashMap::new();
    let mut add = |name: &str, shape: &[usize]| {
        anyhow::Ok(clip.insert(format!("text_model.{name}"), zeros(shape)?))
    };
    add("embeddings.token_embedding.weight", &[49408, 64])?;
    add("embeddings.position_embedding.weight", &[77, 64])?;
    for name in [
        "encoder.layers.0.layer_norm1",
        "encoder.layers.0.layer_norm2",
        "final_layer_norm",
    ] {
        add(&format!("{name}.weight"), &[64])?;
        add(&format!("{name}.bias"), &[64])?;
    }
    let linears = [
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.out_proj",
        "mlp.fc1",
        "mlp.fc2",
    ];
    for name in linears {
        add(&format!("encoder.layers.0.{name}.weight"), &[64, 64])?;
        add(&format!("encoder.layers.0.{name}.bias"), &[64])?;
    }
    clip.insert("logit_scale".into(), zeros(&[])?);
    candle::safetensors::save(&clip, folder.path().join("clip_l.safetensors"))?;

    let mut t5 = HashMap::new();
    let mut add =
        |name: &str, shape: &[usize]| anyhow::Ok(t5.insert(name.to_owned(), zeros(shape)?));
    add("encoder.embed_tokens.weight", &[32128, 8])?;
    add("encoder.final_layer_norm.weight", &[8])?;
    let block = "encoder.block.0.layer";
    add(
        &format!("{block}.0.SelfAttention.relative_attention_bias.weight"),
        &[32, 2],
    )?;
    for name in [
        "0.SelfAttention.q",
        "0.SelfAttention.k",
        "0.SelfAttention.v",
        "0.SelfAttention.o",
    ] {
        add(&format!("{block}.{name}.weight"), &[8, 8])?;
    }
    add(&format!("{block}.0.layer_norm.weight"), &[8])?;
    add(&format!("{block}.1.layer_norm.weight"), &[8])?;
    for name in ["wi_0", "wi_1", "wo"] {
        add(&format!("{block}.1.DenseReluDense.{name}.weight"), &[8, 8])?;
    }
    candle::safetensors::save(&t5, folder.path().join("t5xxl_fp16.safetensors"))?;

    let load = || {
        TextEncoders::load(
            TextModel::ClipAndT5,
            &Files::folder(folder.path()).into(),
            None,
            &[],
            None,
            256,
            DType::F32,
            &Device::Cpu,
        )
    };
    let encoders = load()?;
    let [(_, clip_ids), (_, t5_ids)] = encoders.tokenize("A photo of a cat")?.try_into().unwrap();
    assert_eq!(clip_ids[..7], [49406, 320, 1125, 539, 320, 2368, 49407]);
    assert_eq!(t5_ids[..6], [71, 1202, 13, 3, 9, 1712]);
    let Encoded { txt, vec, .. } = encoders.encode(&["A photo of a cat".to_owned()])?;
    assert_eq!((txt.dims(), vec.dims()), (&[1, 256, 8][..], &[1, 64][..]));

    t5.remove("encoder.block.0.layer.1.DenseReluDense.wo.weight");
    t5.insert(
        "encoder.block.0.layer.1.DenseReluDense.wo.weight".into(),
        zeros(&[9, 8])?,
    );
    candle::safetensors::save(&t5, folder.path().join("t5xxl_fp16.safetensors"))?;
    let error = format!("{:#}", load().err().context("a wrong shape")?);
    assert!(
        error.contains("DenseReluDense.wo.weight") && error.contains("t5xxl_fp16"),
        "{error}"
    );
    std::fs::remove_file(folder.path().join("t5xxl_fp16.safetensors"))?;
    let error = format!("{:#}", load().err().context("a missing file")?);
    assert!(error.contains("holds no T5 text encoder"), "{error}");
    Ok(())
}

#[test]
fn the_vae_gives_diffusers_numbers_both_ways() -> Result<()> {
    let expected = golden("sample.safetensors")?;
    for name in ["dev", "schnell"] {
        let folder = path("tests/golden").join(name);
        let vae = Vae::load_folder(
            &Files::folder(folder.join("pipe/vae")),
            DType::F32,
            &Device::Cpu,
        )?;
        let mean = vae.encode_mean(&expected[&format!("{name}.vae.image")])?;
        let reference = golden(&format!("{name}/reference.safetensors"))?;
        let image = vae.decode(&reference["vae.latents"])?;
        let errors = (
            relative(&mean, &expected[&format!("{name}.vae.mean")])?,
            relative(&image, &reference["vae.image"])?,
        );
        assert!(errors.0 <= 1e-5 && errors.1 <= 1e-5, "{name}: {errors:?}");
        assert!(
            vae.encode_mean(&Tensor::zeros((1, 3, 24, 41), DType::F32, &Device::Cpu)?)
                .is_err()
        );
    }
    Ok(())
}

#[test]
fn a_vae_with_original_names_is_the_same_vae() -> Result<()> {
    let folder = path("tests/golden/dev/pipe/vae");
    let latents = &golden("dev/reference.safetensors")?["vae.latents"];
    let expected =
        Vae::load_folder(&Files::folder(&folder), DType::F32, &Device::Cpu)?.decode(latents)?;

    let tensors = golden("dev/pipe/vae/diffusion_pytorch_model.safetensors")?;
    let mut original = HashMap::new();
    for (name, tensor) in &tensors {
        let name = keys::to_original(name, 4).with_context(|| name.clone())?;
        // attention as 1×1 convolutions
        let matrix = name.contains("attn_1") && tensor.rank() == 2;
        original.insert(
            name,
            if matrix {
                tensor.unsqueeze(2)?.unsqueeze(3)?
            } else {
                tensor.clone()
            },
        );
    }
    let copy = tempfile::tempdir()?;
    candle::safetensors::save(&original, copy.path().join("ae.safetensors"))?;
    let file = copy.path().join("ae.safetensors");
    let whole = Checkpoint::from_blob("ae.safetensors", &Blob::map(&file)?)?;
    let error = Vae::load_weights(&whole, DType::F32, &Device::Cpu).unwrap_err();
    assert!(
        format!("{error:#}").contains("config.json"),
        "channels of 8 do not go with FLUX.1's 32 groups: {error:#}"
    );

    std::fs::copy(folder.join("config.json"), copy.path().join("config.json"))?;
    let vae = Vae::load_folder(&Files::folder(copy.path()), DType::F32, &Device::Cpu)?;
    assert!(relative(&vae.decode(latents)?, &expected)? <= 0.0);
    Ok(())
}

#[test]
fn noise_is_what_torch_draws() -> Result<()> {
    for (name, expected) in golden("torch_randn.safetensors")? {
        let seed: u64 = name.strip_prefix("seed").context("name")?.parse()?;
        let drawn = Generator::new(seed).randn(expected.shape().clone(), &Device::Cpu)?;
        let far = (drawn - expected)?
            .abs()?
            .flatten_all()?
            .max(0)?
            .to_scalar::<f32>()?;
        assert!(far <= 1e-6, "{name}: {far}");
    }
    Ok(())
}
