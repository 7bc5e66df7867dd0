//! Which tensors a FLUX transformer of a configuration has, and their shapes. No values here.

use crate::layout::{BlockKind, BlockSpec, FluxConfig, Form, Replacement};

/// Sinusoids that a timestep or guidance value is spread over (`timestep_embedding` of the reference code).
const SINUSOIDS: usize = 256;

/// Canonical names and shapes of all tensors, in network order.
pub fn tensors(config: &FluxConfig) -> Vec<(String, Vec<usize>)> {
    let hidden = config.hidden_size;
    let mut out = Names {
        biases: config.family.biases,
        all: Vec::new(),
    };
    out.linear("img_in", config.in_channels, hidden);
    out.linear("txt_in", config.context_in_dim, hidden);
    let embedders = [
        ("time_in", SINUSOIDS, true),
        ("vector_in", config.vec_in_dim, config.vec_in_dim > 0),
        ("guidance_in", SINUSOIDS, config.guidance_embed),
    ];
    for (name, input, _) in embedders.into_iter().filter(|(_, _, present)| *present) {
        out.linear(&format!("{name}.in_layer"), input, hidden);
        out.linear(&format!("{name}.out_layer"), hidden, hidden);
    }
    if config.shares_modulation() {
        out.linear("double_stream_modulation_img.lin", hidden, 6 * hidden);
        out.linear("double_stream_modulation_txt.lin", hidden, 6 * hidden);
        out.linear("single_stream_modulation.lin", hidden, 3 * hidden);
    }
    for (spec, prefix) in config.slots() {
        let Some(prefix) = prefix else { continue };
        match spec {
            BlockSpec::Original(id) if id.kind == BlockKind::Double => out.double(config, &prefix),
            BlockSpec::Original(_) => out.single(config, &prefix),
            BlockSpec::Replaced(replacement) => out.replacement(config, replacement, &prefix),
        }
    }
    out.linear("final_layer.adaLN_modulation.1", hidden, 2 * hidden);
    out.linear("final_layer.linear", hidden, config.out_channels);
    out.all
}

struct Names {
    /// Whether the model's own projections have biases.
    biases: bool,
    all: Vec<(String, Vec<usize>)>,
}

impl Names {
    fn linear(&mut self, name: &str, input: usize, output: usize) {
        self.with_bias(name, input, output, self.biases);
    }

    fn with_bias(&mut self, name: &str, input: usize, output: usize, bias: bool) {
        self.all
            .push((format!("{name}.weight"), vec![output, input]));
        if bias {
            self.all.push((format!("{name}.bias"), vec![output]));
        }
    }

    fn norms(&mut self, prefix: &str, head: usize) {
        for norm in ["query_norm", "key_norm"] {
            self.all
                .push((format!("{prefix}.norm.{norm}.scale"), vec![head]));
        }
    }

    fn double(&mut self, config: &FluxConfig, prefix: &str) {
        let hidden = config.hidden_size;
        for stream in ["img", "txt"] {
            let part = format!("{prefix}.{stream}");
            if !config.shares_modulation() {
                self.linear(&format!("{part}_mod.lin"), hidden, 6 * hidden);
            }
            self.linear(&format!("{part}_attn.qkv"), hidden, 3 * hidden);
            self.norms(&format!("{part}_attn"), config.head_dim());
            self.linear(&format!("{part}_attn.proj"), hidden, hidden);
            self.linear(&format!("{part}_mlp.0"), hidden, config.mlp_in_size());
            self.linear(&format!("{part}_mlp.2"), config.mlp_size, hidden);
        }
    }

    fn single(&mut self, config: &FluxConfig, prefix: &str) {
        let hidden = config.hidden_size;
        if !config.shares_modulation() {
            self.linear(&format!("{prefix}.modulation.lin"), hidden, 3 * hidden);
        }
        let mlp_in = config.mlp_in_size();
        self.linear(&format!("{prefix}.linear1"), hidden, 3 * hidden + mlp_in);
        self.norms(prefix, config.head_dim());
        self.linear(
            &format!("{prefix}.linear2"),
            hidden + config.mlp_size,
            hidden,
        );
    }

    fn replacement(&mut self, config: &FluxConfig, replacement: &Replacement, prefix: &str) {
        let (hidden, shares) = (config.hidden_size, config.shares_modulation());
        let streams: &[&str] = if replacement.joint {
            &["linear"]
        } else {
            &["linear.img", "linear.txt"]
        };
        for stream in streams {
            let part = format!("{prefix}.{stream}");
            self.with_bias(&part, hidden, hidden, true);
            match replacement.form {
                Form::Conditioned => self
                    .all
                    .push((format!("{part}.vec.weight"), vec![hidden, hidden])),
                Form::Modulated if !shares => {
                    self.with_bias(&format!("{part}.modulation.lin"), hidden, 3 * hidden, true);
                }
                Form::Remove | Form::Linear | Form::Modulated => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::{
        layout::{BlockId, unpruned},
        model::cost,
        pipeline::{ModelChoice, Pipeline},
    };

    #[test]
    fn the_bundled_model_has_these_tensors_and_no_other() {
        let pipeline = Pipeline::open(&ModelChoice::default()).unwrap();
        let found: BTreeMap<String, Vec<usize>> = pipeline
            .transformer
            .iter()
            .map(|(name, source)| (name.to_owned(), source.shape().to_vec()))
            .collect();
        let named: BTreeMap<_, _> = tensors(&pipeline.config).into_iter().collect();
        assert_eq!(named, found);
    }

    #[test]
    fn every_form_has_as_many_parameters_as_its_cost_says() {
        let mut config = Pipeline::open(&ModelChoice::default()).unwrap().config;
        config.layout = unpruned(5, 3);
        let forms = [
            Form::Linear,
            Form::Conditioned,
            Form::Modulated,
            Form::Remove,
        ];
        for (k, form) in forms.into_iter().enumerate() {
            config.layout[k] = BlockSpec::Replaced(Replacement {
                replaces: vec![BlockId::double(k)],
                form,
                joint: k % 2 == 1,
            });
        }
        let count: usize = tensors(&config)
            .iter()
            .map(|(_, shape)| shape.iter().product::<usize>())
            .sum();
        assert_eq!(count as u64, cost::model(&config, 16, 8).parameters);
    }
}
