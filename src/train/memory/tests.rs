use super::*;
use crate::{
    layout::{BlockId, Form, Replacement, flux_dev, unpruned},
    train::{recipe::LayersRecipe, sandwich::sandwiches},
};

/// 1024×1024 in bf16 on a GPU, everything on it.
const ONE_SAMPLE: Workload = Workload {
    element: 2.0,
    weight: 2.0,
    cpu: false,
    scores: true,
    batch: 1,
    tokens: (512, 4096),
    gradient_checkpointing: true,
    offload: false,
    resident: 0.0,
    batches_per_load: 1,
};

/// FLUX.1-dev with a layer for each stream in the place of one double block.
fn pruned_dev() -> FluxConfig {
    let mut pruned = flux_dev();
    pruned.layout[5] = BlockSpec::Replaced(Replacement {
        replaces: vec![BlockId::double(5)],
        form: Form::Linear,
        joint: false,
    });
    pruned
}

#[test]
fn a_sandwich_of_flux_dev_fits_24_gigabytes_when_the_rest_is_elsewhere() {
    let teacher = flux_dev();
    let mut pruned = flux_dev();
    for block in [5, 20, 30] {
        let replaces = match pruned.layout[block] {
            BlockSpec::Original(id) => vec![id],
            BlockSpec::Replaced(_) => continue,
        };
        pruned.layout[block] = BlockSpec::Replaced(Replacement {
            replaces,
            form: Form::Linear,
            joint: false,
        });
    }
    let recipe = SandwichRecipe::default();
    let found = sandwiches(&pruned.layout, &teacher.layout, &LayersRecipe::default()).unwrap();
    let workload = |offload| Workload {
        offload,
        ..ONE_SAMPLE
    };
    for sandwich in found.iter().map(Some).chain([None]) {
        let take = |offload| {
            estimate(
                &pruned,
                &teacher,
                &found,
                sandwich,
                &recipe,
                workload(offload),
            )
            .bytes()
        };
        assert!(take(true) < 12e9, "{} {sandwich:?}", take(true));
        assert!(take(false) > 23.8e9, "{}", take(false));
    }
}

#[test]
fn packed_weights_count_as_they_are_held() {
    let teacher = flux_dev();
    let pruned = pruned_dev();
    let recipe = SandwichRecipe::default();
    let found = sandwiches(&pruned.layout, &teacher.layout, &LayersRecipe::default()).unwrap();
    let weights = |weight, gradient_checkpointing| {
        let workload = Workload {
            weight,
            gradient_checkpointing,
            ..ONE_SAMPLE
        };
        estimate(&pruned, &teacher, &found, found.first(), &recipe, workload).weights
    };
    let (dense, packed) = (weights(2.0, true), weights(1.0, true));
    // half of it, and what is wide: a double block and the two new layers
    let block = 2.0 * 339_821_056.0;
    let layers = 2.0 * 2.0 * 3072.0 * 3073.0;
    let want = (dense - layers) / 2.0 + layers + block;
    assert!((packed - want).abs() < 1e6, "{packed} {want}");
    assert!((weights(1.0, false) - packed - block).abs() < 1e6);
    assert!((weights(2.0, false) - dense).abs() < 0.5);
}

#[test]
fn scores_count_where_the_backward_pass_holds_them() {
    let teacher = flux_dev();
    let pruned = pruned_dev();
    let recipe = SandwichRecipe::default();
    let found = sandwiches(&pruned.layout, &teacher.layout, &LayersRecipe::default()).unwrap();
    let activations = |scores, tokens| {
        let workload = Workload {
            scores,
            tokens,
            ..ONE_SAMPLE
        };
        estimate(&pruned, &teacher, &found, found.first(), &recipe, workload).activations
    };
    let of_scores = |tokens| activations(true, tokens) - activations(false, tokens);
    // slices of 2^26 of them, or all there are: 24 heads of 128 tokens
    let (sliced, all) = (of_scores((512, 4096)), of_scores((64, 64)));
    assert!((sliced - 16.0 * 2f64.powi(26)).abs() < 1.0, "{sliced}");
    assert!((all - 16.0 * 24.0 * 128.0 * 128.0).abs() < 1.0, "{all}");
}

#[test]
fn as_many_batches_per_load_as_are_counted() {
    let teacher = flux_dev();
    let pruned = pruned_dev();
    let recipe = SandwichRecipe::default();
    let found = sandwiches(&pruned.layout, &teacher.layout, &LayersRecipe::default()).unwrap();
    let alone = Workload {
        offload: true,
        ..ONE_SAMPLE
    };
    let peak = |batches_per_load| {
        let workload = Workload {
            batches_per_load,
            ..alone
        };
        estimate(&pruned, &teacher, &found, found.first(), &recipe, workload).bytes()
    };
    let most = alone.max_batches_per_load(&pruned, 1000, None);
    assert!((20..=MAX_BATCHES_PER_LOAD).contains(&most), "{most}");
    assert!(peak(most) <= peak(1) + MAX_LOADED_BATCH_BYTES);
    assert!(peak(most + 1) > peak(1) + MAX_LOADED_BATCH_BYTES);
    let room = 5e8;
    let few = alone.max_batches_per_load(&pruned, 1000, Some(room));
    assert!(peak(few) <= peak(1) + room && peak(few + 1) > peak(1) + room);
    assert_eq!(alone.max_batches_per_load(&pruned, 3, None), 3);
    assert_eq!(alone.max_batches_per_load(&pruned, 1000, Some(-1.0)), 1);
    let resident = Workload {
        offload: false,
        ..alone
    };
    assert_eq!(resident.max_batches_per_load(&pruned, 1000, None), 1);
}

#[test]
fn trainables_are_those_that_training_makes() {
    let teacher = FluxConfig {
        hidden_size: 32,
        num_heads: 2,
        mlp_size: 96,
        axes_dims: vec![4, 6, 6],
        layout: unpruned(2, 2),
        ..flux_dev()
    };
    let mut pruned = teacher.clone();
    pruned.layout[1] = BlockSpec::Replaced(Replacement {
        replaces: vec![BlockId::double(1)],
        form: Form::Linear,
        joint: false,
    });
    let recipe = SandwichRecipe {
        lora: LoraRecipe {
            rank: Some(4),
            ..LoraRecipe::default()
        },
        ..SandwichRecipe::default()
    };
    let double = 2 * 4 * ((32 + 192) + (32 + 96) + (32 + 32) + 2 * (32 + 96));
    let single = 4 * ((32 + 96) + (32 + 192) + (128 + 32));
    let layers = 2 * 32 * 33;
    let all: f64 = (0..3)
        .map(|i| values(&pruned, &pruned.layout[i], &recipe.lora))
        .sum();
    assert!((all - f64::from(double + layers + single)).abs() < 0.5);
}
