//! Block lists and plans that strangers write: never a panic, and what is accepted makes sense.

use proptest::prelude::*;

use super::{tests::config, *};

/// A set of the blocks of a model of 2 double and 4 single ones, not all of them.
fn some_blocks() -> impl Strategy<Value = Vec<BlockId>> {
    let all = config(2, 4).kept_ids();
    proptest::sample::subsequence(all.clone(), 1..all.len())
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_list_of_blocks_is_read_or_refused(text in "[a-z0-9.,: -]{0,40}") {
        let config = config(2, 4);
        if let Ok(blocks) = parse_blocks("--blocks", &text, &config) {
            let known = config.kept_ids();
            prop_assert!(!blocks.is_empty() && blocks.iter().all(|id| known.contains(id)));
        }
    }

    #[test]
    fn a_list_names_the_blocks_that_it_was_written_from(blocks in some_blocks()) {
        let text: Vec<String> = blocks.iter().map(ToString::to_string).collect();
        let read = parse_blocks("--blocks", &text.join(","), &config(2, 4)).unwrap();
        prop_assert_eq!(read, blocks);
    }

    #[test]
    fn a_plan_comes_back_from_its_file_and_leaves_the_other_blocks(
        blocks in some_blocks(),
        collapse: bool,
    ) {
        let config = config(2, 4);
        let plan = PruningPlan::new(
            &config, String::new(), blocks.clone(), Form::Linear, false, collapse, String::new(),
        );
        prop_assert_eq!(plan.validate(&config), Ok(()));
        let text = serde_json::to_string(&plan).unwrap();
        prop_assert_eq!(&serde_json::from_str::<PruningPlan>(&text).unwrap(), &plan);
        let pruned = FluxConfig { layout: plan.layout(&config), ..config.clone() };
        let mut all = pruned.kept_ids();
        all.extend(blocks);
        all.sort();
        prop_assert_eq!(all, config.kept_ids());
    }

    #[test]
    fn any_text_is_a_plan_or_an_error(text in r#"[\[\]{}":,a-z0-9. -]{0,60}"#) {
        if let Ok(plan) = serde_json::from_str::<PruningPlan>(&text) {
            let _ = plan.validate(&config(2, 4));
        }
    }
}
