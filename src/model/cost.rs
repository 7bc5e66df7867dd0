//! Parameters and floating-point operations, counted from the configuration alone; no tensor is touched.

use std::iter::Sum;
use std::ops::Add;

use crate::layout::{BlockKind, BlockSpec, FluxConfig, Form, ModulationSource};

/// Cost of a part of the model for one call at batch 1. A multiply-add is two operations; norms, activations and
/// other element-wise work (below 0.1 % at full size) are left out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cost {
    /// Number of parameters.
    pub parameters: u64,
    /// Operations of the projections.
    pub matmul_flops: u64,
    /// Operations of the products of queries with keys and of attention weights with values.
    pub attention_flops: u64,
}

impl Cost {
    /// A projection applied to `rows` tokens.
    fn linear(input: usize, output: usize, bias: bool, rows: usize) -> Self {
        let (input, output, rows) = (input as u64, output as u64, rows as u64);
        Self {
            parameters: (input + u64::from(bias)) * output,
            matmul_flops: 2 * rows * input * output,
            attention_flops: 0,
        }
    }

    fn parameters(count: usize) -> Self {
        Self {
            parameters: count as u64,
            ..Self::default()
        }
    }

    /// All operations.
    pub fn flops(&self) -> u64 {
        self.matmul_flops + self.attention_flops
    }
}

impl Add for Cost {
    type Output = Self;
    fn add(self, other: Self) -> Self {
        Self {
            parameters: self.parameters + other.parameters,
            matmul_flops: self.matmul_flops + other.matmul_flops,
            attention_flops: self.attention_flops + other.attention_flops,
        }
    }
}

impl Sum for Cost {
    fn sum<I: Iterator<Item = Self>>(costs: I) -> Self {
        costs.fold(Self::default(), Add::add)
    }
}

/// One entry of the layout on `img` image and `txt` text tokens.
pub fn block(config: &FluxConfig, spec: &BlockSpec, img: usize, txt: usize) -> Cost {
    let hidden = config.hidden_size;
    let (mlp_in, mlp_out) = (config.mlp_in_size(), config.mlp_size);
    let tokens = img + txt;
    let linear = |input, output, rows| Cost::linear(input, output, config.family.biases, rows);
    // shared modulation is counted outside of the blocks
    let modulation = |parts: usize| match config.family.modulation {
        ModulationSource::PerBlock => linear(hidden, parts * hidden, 1),
        ModulationSource::Shared => Cost::default(),
    };
    let norms = Cost::parameters(2 * config.axes_dims.iter().sum::<usize>());
    let attention = Cost {
        attention_flops: 4 * (tokens * tokens) as u64 * hidden as u64,
        ..Cost::default()
    };
    match spec {
        BlockSpec::Original(id) if id.kind == BlockKind::Double => {
            let half = |rows| {
                modulation(6)
                    + linear(hidden, 3 * hidden, rows)
                    + norms
                    + linear(hidden, hidden, rows)
                    + linear(hidden, mlp_in, rows)
                    + linear(mlp_out, hidden, rows)
            };
            half(img) + half(txt) + attention
        }
        BlockSpec::Original(_) => {
            modulation(3)
                + linear(hidden, 3 * hidden + mlp_in, tokens)
                + norms
                + linear(hidden + mlp_out, hidden, tokens)
                + attention
        }
        BlockSpec::Replaced(replacement) => {
            let layer = |rows| {
                let linear = Cost::linear(hidden, hidden, true, rows);
                match replacement.form {
                    Form::Remove => Cost::default(),
                    Form::Linear => linear,
                    // V has no bias and is applied once, not to every token
                    Form::Conditioned => {
                        linear
                            + Cost {
                                parameters: (hidden * hidden) as u64,
                                matmul_flops: 2 * (hidden * hidden) as u64,
                                attention_flops: 0,
                            }
                    }
                    // where all blocks share their modulation, the layer takes its parts of it
                    Form::Modulated if config.shares_modulation() => linear,
                    Form::Modulated => linear + Cost::linear(hidden, 3 * hidden, true, 1),
                }
            };
            if replacement.joint {
                layer(tokens)
            } else {
                layer(img) + layer(txt)
            }
        }
    }
}

/// What is not in the trunk: input projections, embeddings of timestep, guidance and pooled text, modulation that all
/// blocks share, and the head.
pub fn embedder_and_head(config: &FluxConfig, img: usize, txt: usize) -> Cost {
    let hidden = config.hidden_size;
    let linear = |input, output, rows| Cost::linear(input, output, config.family.biases, rows);
    let embedder = |present: bool, input| {
        let cost = linear(input, hidden, 1) + linear(hidden, hidden, 1);
        if present { cost } else { Cost::default() }
    };
    let shared = match config.family.modulation {
        ModulationSource::PerBlock => Cost::default(),
        ModulationSource::Shared => linear(hidden, (6 + 6 + 3) * hidden, 1),
    };
    linear(config.in_channels, hidden, img)
        + linear(config.context_in_dim, hidden, txt)
        + embedder(true, super::embed::SINUSOID)
        + embedder(config.guidance_embed, super::embed::SINUSOID)
        + embedder(config.vec_in_dim > 0, config.vec_in_dim)
        + shared
        + linear(hidden, 2 * hidden, 1)
        + linear(hidden, config.out_channels, img)
}

/// The whole transformer on `img` image and `txt` text tokens.
pub fn model(config: &FluxConfig, img: usize, txt: usize) -> Cost {
    let blocks: Cost = config
        .layout
        .iter()
        .map(|spec| block(config, spec, img, txt))
        .sum();
    blocks + embedder_and_head(config, img, txt)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::{BlockId, Replacement, flux_dev, unpruned};
    use crate::model::testing::small_config;

    fn original(kind: BlockKind) -> BlockSpec {
        BlockSpec::Original(BlockId { kind, index: 0 })
    }

    #[test]
    fn flux_dev_costs_what_is_published() {
        let config = flux_dev();
        let double = block(&config, &original(BlockKind::Double), 4096, 512);
        let single = block(&config, &original(BlockKind::Single), 4096, 512);
        assert_eq!(double.parameters, 339_831_296);
        assert_eq!(single.parameters, 141_591_808);
        for cost in [double, single] {
            assert_eq!(cost.matmul_flops.div_ceil(1_000_000_000), 1044);
            assert_eq!(cost.attention_flops.div_ceil(1_000_000_000), 261);
        }
        assert_eq!(model(&config, 4096, 512).parameters, 11_901_408_320);
    }

    #[test]
    fn a_fifth_of_kleins_blocks_costs_what_was_worked_out() {
        let mut config = FluxConfig {
            in_channels: 128,
            out_channels: 128,
            context_in_dim: 7680,
            vec_in_dim: 0,
            guidance_embed: false,
            axes_dims: vec![32; 4],
            theta: 2000.0,
            family: crate::layout::Family::FLUX2,
            mlp_size: 9216,
            layout: unpruned(5, 20),
            ..flux_dev()
        };
        let before = model(&config, 4096, 512);
        assert_eq!(before.parameters, 3_875_544_576);
        for k in 5..10 {
            config.layout[k] = BlockSpec::Replaced(Replacement {
                replaces: vec![BlockId::single(k - 5)],
                form: Form::Linear,
                joint: true,
            });
        }
        let after = model(&config, 4096, 512);
        let speed = before.flops() as f64 / after.flops() as f64;
        assert!((speed - 1.23).abs() < 5e-3, "{speed}");
        let freed = 1.0 - after.parameters as f64 / before.parameters as f64;
        assert!((freed - 0.146).abs() < 5e-4, "{freed}");
    }

    #[test]
    fn replacements_cost_a_layer_for_each_stream() {
        let config = flux_dev();
        let cost = |form, joint| {
            let replaces = vec![BlockId {
                kind: BlockKind::Single,
                index: 3,
            }];
            block(
                &config,
                &BlockSpec::Replaced(Replacement {
                    replaces,
                    form,
                    joint,
                }),
                4096,
                512,
            )
        };
        assert_eq!(cost(Form::Remove, false), Cost::default());
        assert_eq!(cost(Form::Linear, true).parameters, 3072 * 3073);
        assert_eq!(cost(Form::Linear, false).parameters, 2 * 3072 * 3073);
        assert_eq!(
            cost(Form::Linear, false).flops(),
            cost(Form::Linear, true).flops()
        );
    }

    #[test]
    fn the_count_is_that_of_the_tensors_read() -> candle::Result<()> {
        let mut config = small_config();
        config.layout = unpruned(2, 3);
        config.layout[1] = BlockSpec::Replaced(Replacement {
            replaces: vec![BlockId {
                kind: BlockKind::Double,
                index: 1,
            }],
            form: Form::Linear,
            joint: false,
        });
        let tensors = crate::model::testing::tensors_of(&config)?;
        let read: usize = tensors.values().map(candle::Tensor::elem_count).sum();
        assert_eq!(model(&config, 4, 3).parameters, read as u64);
        Ok(())
    }
}
