//! Any bytes as a plan, scores, a recipe, a record, a VAE's or a scheduler's configuration, and as statistics.
#![no_main]

use fastflux::{
    calibrate::file::Calibration,
    checkpoint::record::Record,
    prune::{plan::PruningPlan, recipe::PruneRecipe},
    sample::{schedule::Schedule, vae::VaeConfig},
    score::Scores,
    train::recipe::SandwichRecipe,
};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("file");
    std::fs::write(&path, bytes).expect("a file");
    let _ = PruningPlan::read(&path);
    if let Ok(recipe) = PruneRecipe::read(&path) {
        let _ = recipe.validate();
    }
    let _ = SandwichRecipe::read(&path);
    if let Ok(scores) = Scores::read(&path) {
        let _ = fastflux::score::chart::svg(&scores);
    }
    let _ = VaeConfig::from_json(bytes);
    if let Ok(schedule) = Schedule::from_json(bytes) {
        let _ = schedule.sigmas(4, 256);
    }
    if let Ok(value) = serde_json::from_slice(bytes) {
        let _ = Record::from_value("file", value);
    }
    let _ = Calibration::open(&path);
});
