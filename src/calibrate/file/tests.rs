use candle::DType;

use super::*;
use crate::{calibrate::recipe::CalibrationRecipe, layout::unpruned};

/// Two units of 4 tokens' images, one held out.
fn calibration() -> Calibration {
    let recipe = CalibrationRecipe {
        num_prompts: Some(2),
        noise_levels_per_image: Some(1.0),
        steps: Some(1),
        guidance: Some(3.5),
        width: Some(32),
        height: Some(32),
        batch: Some(2),
        ..CalibrationRecipe::default()
    };
    let header = Header {
        version: Header::VERSION,
        model: String::new(),
        model_name: String::new(),
        runtime: String::new(),
        recipe,
        prompts: vec![String::new(); 3],
        num_prompts: 2,
        products: Vec::new(),
        units: 2,
        done: BTreeSet::from([0, 1]),
    };
    let mut out = Calibration::new(header, &unpruned(1, 0));
    for (unit, prompts) in [(0, 2), (1, 1)] {
        let images = Tensor::zeros((prompts, 4, 64), DType::F32, &Device::Cpu);
        out.images.insert(unit, images.unwrap());
    }
    out
}

fn read(change: impl FnOnce(&mut Calibration)) -> Result<Calibration> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("s.safetensors");
    let mut calibration = calibration();
    change(&mut calibration);
    calibration.write(&path).unwrap();
    Calibration::open(&path)
}

#[test]
fn a_header_that_contradicts_itself_is_refused_with_file_and_field() {
    assert_eq!(read(|_| ()).unwrap().images.len(), 2);
    let refused = |change: fn(&mut Header), words: &str| {
        let error = read(|c| change(&mut c.header)).unwrap_err();
        let text = format!("{error:#}");
        assert!(
            text.contains("s.safetensors") && text.contains(words),
            "{text}"
        );
    };
    refused(|h| h.recipe.batch = Some(0), "batch");
    refused(
        |h| h.recipe.noise_levels_per_image = Some(-1.0),
        "noise-levels-per-image",
    );
    refused(|h| h.recipe.steps = Some(0), "--steps 0");
    refused(|h| h.recipe.steps = None, "`recipe.steps` is missing");
    refused(|h| h.recipe.guidance = None, "`recipe.guidance`");
    refused(|h| h.recipe.guidance = Some(-1.0), "guidance");
    refused(|h| h.num_prompts = 3, "`num-prompts` is 3 of 3");
    refused(|h| h.units = 3, "`units` is 3");
    refused(|h| h.recipe.width = Some(64), "images.000000");
}

#[test]
fn tensors_that_do_not_fit_or_are_not_numbers_are_refused_by_name() {
    let refused = |change: fn(&mut Calibration), tensor: &str| {
        let text = format!("{:#}", read(change).unwrap_err());
        assert!(
            text.contains("s.safetensors") && text.contains(tensor),
            "{text}"
        );
    };
    let nan = |c: &mut Calibration| c.stats.blocks[0].img.buckets[3].cosine = f64::NAN;
    refused(nan, "double.00.img.moments");
    let narrow = |c: &mut Calibration| {
        let images = Tensor::zeros((1, 4, 32), DType::F32, &Device::Cpu);
        c.images.insert(1, images.unwrap());
    };
    refused(narrow, "images.000001");
    let infinite = |c: &mut Calibration| {
        let images = Tensor::full(f32::INFINITY, (1, 4, 64), &Device::Cpu);
        c.images.insert(1, images.unwrap());
    };
    refused(infinite, "images.000001");
    // a block whose sums were gathered lacks them
    refused(
        |c| c.header.products = vec![BlockId::double(0)],
        "double.00.txt.gram",
    );
}
