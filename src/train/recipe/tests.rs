use super::*;

#[test]
fn the_recipe_in_configs_is_the_default() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs/sandwich.json");
    assert_eq!(
        SandwichRecipe::read(&path).unwrap(),
        SandwichRecipe::default()
    );
}

#[test]
fn a_recipe_of_an_earlier_version_opens() {
    let old: SandwichRecipe = serde_json::from_str(r#"{"finish": {"steps": 7}}"#).unwrap();
    assert_eq!(old.finetune.steps, 7);
}

#[test]
fn a_misspelt_key_is_refused_by_name() {
    let error = serde_json::from_str::<SandwichRecipe>(r#"{"lora": {"rnak": 1}}"#).unwrap_err();
    assert!(error.to_string().contains("rnak"), "{error}");
}

#[test]
fn the_learning_rate_warms_up_and_decays_to_nothing() {
    let recipe = OptimiserRecipe::default();
    let rate = |step| recipe.rate(1.0, step, 100);
    assert!((rate(0) - 0.025).abs() < 1e-9);
    assert!(rate(39) > 0.6 && rate(39) < 1.0);
    assert!((0..39).all(|step| rate(step + 1) > rate(step)));
    assert!(rate(99) < 1e-3 && rate(99) > 0.0);
    assert!((0..99).skip(40).all(|step| rate(step + 1) < rate(step)));
}

#[test]
fn numbers_out_of_range_are_refused_by_name() {
    let refused = |change: fn(&mut SandwichRecipe), word: &str| {
        let mut recipe = SandwichRecipe::default();
        change(&mut recipe);
        let error = recipe.validate(128).unwrap_err().to_string();
        assert!(error.contains(word), "{error}");
    };
    SandwichRecipe::default().validate(128).unwrap();
    refused(|r| r.lora.rank = Some(0), "--rank 0");
    refused(|r| r.lora.rank = Some(129), "--rank 129");
    refused(|r| r.optimiser.lr = f64::NAN, "--lr");
    refused(|r| r.optimiser.beta2 = 1.0, "beta2");
    refused(|r| r.data.batch = Some(0), "--batch 0");
    refused(|r| (r.steps, r.finetune.steps) = (0, 0), "nothing");
    refused(|r| r.data.accumulate = 0, "--accumulate 0");
    refused(|r| r.data.guidance = Some(-1.0), "data.guidance");
    // nor may a slip of the finger exhaust memory
    refused(|r| r.data.batch = Some(100_000_000), "--batch 1");
    refused(
        |r| r.data.num_prompts = Some(usize::MAX),
        "--num-prompts 18",
    );
    refused(|r| r.data.cache = usize::MAX, "--cache 18");
    refused(|r| r.data.steps = Some(1 << 63), "data.steps");
    refused(|r| r.data.held_out = Some(1 << 63), "data.held-out");
    refused(|r| r.steps = usize::MAX, "--steps 18");
}
