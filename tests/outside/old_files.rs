//! Files that version 0.1 wrote still open: a plan, both recipes, scores, and the record in a config.json.

use std::path::Path;

use fastflux::{
    pipeline::{ModelChoice, Pipeline},
    prune::{goal::PruneTarget, plan::PruningPlan, recipe::PruneRecipe},
    score::{Metric, Scores},
    train::recipe::{Method, SandwichRecipe},
};

use crate::common::*;

fn old(name: &str) -> String {
    golden(&format!("v0.1/{name}"))
}

#[test]
fn plans_and_scores_fit_the_model_that_they_were_made_for() {
    let pipeline = Pipeline::open(&ModelChoice::default()).unwrap();
    let plan = PruningPlan::read(Path::new(&old("plan.json"))).unwrap();
    let PruneTarget::Plan(plan) = PruneTarget::given(plan, &pipeline).unwrap() else {
        panic!("a plan is a target of its own")
    };
    let blocks: Vec<String> = plan.blocks().map(|id| id.to_string()).collect();
    assert_eq!(blocks, ["double.01", "single.03", "single.04"]);
    let scores = Scores::read(Path::new(&old("scores.json"))).unwrap();
    scores.check_blocks(&pipeline.config.kept_ids()).unwrap();
    assert_eq!(scores.metric, Metric::FitError);
    assert!(scores.importance(Metric::FitError).unwrap().len() == 15);
}

#[test]
fn recipes_say_what_they_said() {
    let prune = PruneRecipe::read(Path::new(&old("prune.json"))).unwrap();
    assert_eq!(prune, PruneRecipe::default());
    let sandwich = SandwichRecipe::read(Path::new(&old("sandwich.json"))).unwrap();
    let mut expected = SandwichRecipe::default();
    expected.optimiser.method = Method::Adamw;
    expected.optimiser.lr = 3e-3;
    expected.lora.rank = Some(32);
    expected.finetune.steps = 400;
    expected.finetune.lr = Some(2e-3);
    assert_eq!(sandwich, expected);
}

#[test]
fn a_record_opens_as_the_pruned_layout() {
    let work = folder();
    let config = old("config.json");
    let args = ["init", "--config", &config, "--dtype", "f32", "--json"];
    let made = [&args[..], &["--output", "x.safetensors"]].concat();
    json(work.path(), &made);
    let shown = json(
        work.path(),
        &["inspect", "--model", "x.safetensors", "--json"],
    );
    assert_eq!(shown["replaced_blocks"], 3);
    assert_eq!(shown["family"], "the bundled tiny FLUX");
}
