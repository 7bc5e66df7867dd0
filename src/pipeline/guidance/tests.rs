//! What is taken for what, and which steps and scales follow.

use serde_json::json;

use super::*;
use crate::pipeline::ModelChoice;

fn without_embedding() -> Pipeline {
    let mut pipeline = Pipeline::open(&ModelChoice::default()).unwrap();
    pipeline.config.guidance_embed = false;
    pipeline.defaults = Defaults::default();
    pipeline.record = None;
    pipeline.scheduler = scheduler::released(false);
    pipeline.scheduler_name = format!("FLUX.1{}", scheduler::RELEASED);
    pipeline
}

#[test]
fn distillation_is_told_by_name_and_scheduler() {
    let mut config = without_embedding().config;
    let dynamic = json!({ "use_dynamic_shifting": true });
    let fixed = json!({ "use_dynamic_shifting": false });
    for (locator, scheduler, released, expected) in [
        ("a/flux-dev-de-distill", &fixed, true, Some(Evidence::Name)),
        (
            "x/FluxDeDistilled_Q4.gguf",
            &fixed,
            true,
            Some(Evidence::Name),
        ),
        ("de-distilled/flux1.gguf", &fixed, true, None),
        ("ostris/OpenFLUX.1/", &fixed, false, Some(Evidence::Name)),
        ("flux.safetensors", &fixed, true, None),
        ("flux", &dynamic, false, Some(Evidence::Scheduler)),
        ("flux", &dynamic, true, None),
        ("black-forest-labs/FLUX.1-schnell", &fixed, false, None),
    ] {
        let found = evidence(&config, locator, scheduler, released);
        assert_eq!(found, expected, "{locator}");
    }
    config.guidance_embed = true;
    assert_eq!(evidence(&config, "de-distill", &dynamic, false), None);
}

#[test]
fn a_model_without_distillation_gets_no_four_steps() {
    let mut pipeline = without_embedding();
    assert_eq!(
        (pipeline.default_steps(), pipeline.default_guidance()),
        (4, 0.0)
    );
    assert!(pipeline.guide(None, Some("rain")).is_err());
    pipeline.undistill(Evidence::Name);
    assert_eq!(
        (pipeline.default_steps(), pipeline.default_guidance()),
        (28, 3.5)
    );
    assert_eq!(pipeline.scheduler["use_dynamic_shifting"], true);
    assert_eq!(pipeline.guide(Some(2.0), Some("rain")).unwrap(), Some(2.0));
    assert!((pipeline.cfg_scale(2.0) - 2.0).abs() < f64::EPSILON);
    pipeline.set_true_cfg(Some(1.0)).unwrap();
    assert!(!pipeline.takes_negative_prompt());
}

#[test]
fn true_cfg_says_that_a_model_is_not_distilled_unless_its_files_say_more() {
    let mut unknown = without_embedding();
    unknown.set_true_cfg(Some(3.0)).unwrap();
    assert_eq!(unknown.default_steps(), 28);
    assert_eq!(unknown.guide(None, None).unwrap(), Some(3.0));
    let mut schnell = without_embedding();
    schnell.scheduler_name = "`scheduler_config.json`".to_owned();
    schnell.set_true_cfg(Some(3.0)).unwrap();
    assert_eq!(schnell.default_steps(), 4);
    assert!((schnell.cfg_scale(schnell.default_guidance()) - 3.0).abs() < f64::EPSILON);
    let mut dev = without_embedding();
    dev.config.guidance_embed = true;
    dev.set_true_cfg(Some(2.0)).unwrap();
    assert_eq!(dev.guide(None, Some("rain")).unwrap(), Some(3.5));
    assert!((dev.cfg_scale(3.5) - 2.0).abs() < f64::EPSILON);
    assert!(dev.set_true_cfg_of_data(Some(2.0)).is_err());
}
