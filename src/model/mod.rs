//! The FLUX transformer, written once for inference, calibration and training: embedder → trunk → head.
//! It sees a `VarBuilder` with the original tensor names and nothing of files.
//!
//! Kept in f32 whatever the weights' dtype: the rotary table and the rotation, the sinusoidal embedding, the statistics
//! of all norms, LoRA weights.

mod block;
pub mod cost;
mod double;
mod embed;
mod head;
mod linear;
pub mod memory;
mod modulation;
pub mod ops;
mod output_projection;
mod replacement;
mod rope;
#[cfg(test)]
mod shared_modulation_tests;
mod single;
mod stream;
#[cfg(test)]
mod testing;
mod trunk;
mod weight;

pub use block::Block;
pub use double::DoubleBlock;
pub use embed::Inputs;
pub use linear::{Linear, Lora};
pub use modulation::{BlockModulation, Modulation};
pub use output_projection::OutputProjection;
pub use replacement::{AffineLayer, ReplacementBlock};
pub use rope::Rope;
pub use single::SingleBlock;
pub use stream::{Conditioning, Stream};
pub use trunk::{Observer, Trunk};

use std::sync::Arc;

use candle::{Result, Tensor};
use candle_nn::VarBuilder;

use crate::layout::FluxConfig;
use embed::Embedder;
use head::Head;

/// The whole transformer; clones share the weights (BFL `Flux`, diffusers `FluxTransformer2DModel`).
#[derive(Clone, Debug)]
pub struct Flux {
    embedder: Arc<Embedder>,
    /// The blocks.
    pub trunk: Trunk,
    head: Head,
}

impl Flux {
    /// Reads the model in the dtype and on the device of `vb`, under the original names (`double_blocks.0.img_attn.qkv`).
    ///
    /// Fails if a tensor is missing or has another shape than `config` says.
    #[expect(
        clippy::needless_pass_by_value,
        reason = "every model on candle is built from a `VarBuilder` by value"
    )]
    pub fn new(config: &FluxConfig, vb: VarBuilder) -> Result<Self> {
        Self::from_trunk(config, Trunk::load(config, &vb), &vb)
    }

    /// The same with blocks that are read from `vb` whenever they are run, except those for which `resident` says yes.
    ///
    /// Fails as [`Flux::new`], but at missing blocks only when they are run.
    pub fn offloaded(
        config: &FluxConfig,
        vb: &VarBuilder<'static>,
        resident: &dyn Fn(usize) -> bool,
    ) -> Result<Self> {
        Self::from_trunk(config, Trunk::offloaded(config, vb, resident), vb)
    }

    fn from_trunk(config: &FluxConfig, trunk: Result<Trunk>, vb: &VarBuilder) -> Result<Self> {
        let head_dim = config.axes_dims.iter().sum::<usize>();
        if config.num_heads * head_dim != config.hidden_size {
            candle::bail!(
                "hidden size {} is not {} heads of {head_dim} (sum of axes_dims {:?})",
                config.hidden_size,
                config.num_heads,
                config.axes_dims
            );
        }
        Ok(Self {
            embedder: Arc::new(Embedder::new(config, vb)?),
            trunk: trunk?,
            head: Head::new(config, &vb.pp("final_layer"))?,
        })
    }

    /// The same embeddings with other blocks, and the head read from `vb`: a pruned model that shares what it can.
    ///
    /// Fails if a tensor of the head is missing or has another shape than `config` says.
    pub fn with_trunk_and_head(
        &self,
        config: &FluxConfig,
        trunk: Trunk,
        vb: &VarBuilder,
    ) -> Result<Self> {
        Ok(Self {
            embedder: self.embedder.clone(),
            trunk,
            head: Head::new(config, &vb.pp("final_layer"))?,
        })
    }

    /// Tokens before the first block and what all blocks share.
    pub fn embed(&self, inputs: &Inputs) -> Result<(Stream, Conditioning)> {
        self.embedder.forward(inputs)
    }

    /// Velocity of the image tokens, (batch, image tokens, out_channels), in the model's dtype, from the tokens after
    /// the last block.
    pub fn head(&self, stream: &Stream, conditioning: &Conditioning) -> Result<Tensor> {
        self.head.forward(stream, conditioning)
    }

    /// What the projection to the velocity is applied to, (batch, image tokens, hidden), from the tokens after the last
    /// block.
    pub fn head_input(&self, stream: &Stream, conditioning: &Conditioning) -> Result<Tensor> {
        self.head.input(stream, conditioning)
    }

    /// The projection to the velocity (`final_layer.linear`), hidden → out_channels.
    pub fn head_linear_mut(&mut self) -> &mut Linear {
        self.head.linear_mut()
    }

    /// One call: velocity of the image tokens, (batch, image tokens, out_channels), in the model's dtype.
    pub fn forward(&self, inputs: &Inputs, observer: &mut dyn Observer) -> Result<Tensor> {
        let (stream, conditioning) = self.embed(inputs)?;
        let stream =
            self.trunk
                .forward_range(0..self.trunk.len(), &stream, &conditioning, observer)?;
        self.head(&stream, &conditioning)
    }
}

#[cfg(test)]
mod tests {
    use candle::DType;

    use super::testing::{SmallInputs, close, random_flux, small_config};
    use super::*;
    use crate::layout::{BlockId, BlockSpec, Form, Replacement};

    #[test]
    fn samples_of_a_batch_do_not_see_each_other() -> Result<()> {
        let config = small_config();
        let flux = random_flux(&config, DType::F32)?;
        let inputs = SmallInputs::new(&config, 3)?;
        let all = inputs.borrowed();
        let together = flux.forward(&all, &mut ())?;
        assert_eq!(together.dims(), [3, 6, 8]);
        for sample in 0..3 {
            let take = |x: &Tensor| x.narrow(0, sample, 1);
            let (img, txt, vec) = (take(all.img)?, take(all.txt)?, take(all.vec)?);
            let (timestep, guidance) = (take(all.timestep)?, all.guidance.map(take).transpose()?);
            let one = Inputs {
                img: &img,
                txt: &txt,
                vec: &vec,
                timestep: &timestep,
                guidance: guidance.as_ref(),
                ..all
            };
            close(&flux.forward(&one, &mut ())?, &take(&together)?, 2e-6)?;
        }
        Ok(())
    }

    #[test]
    fn guidance_is_required_where_the_model_has_it_and_ignored_elsewhere() -> Result<()> {
        let mut config = small_config();
        let inputs = SmallInputs::new(&config, 1)?;
        let without = Inputs {
            guidance: None,
            ..inputs.borrowed()
        };
        let error = random_flux(&config, DType::F32)?
            .forward(&without, &mut ())
            .expect_err("no guidance");
        assert!(error.to_string().contains("guidance"), "{error}");
        config.guidance_embed = false;
        let flux = random_flux(&config, DType::F32)?;
        close(
            &flux.forward(&inputs.borrowed(), &mut ())?,
            &flux.forward(&without, &mut ())?,
            0.0,
        )
    }

    #[test]
    fn images_of_one_size_share_a_rotary_table() -> Result<()> {
        let config = small_config();
        let flux = random_flux(&config, DType::F32)?;
        let rope = |inputs: &Inputs| Ok::<_, candle::Error>(flux.embed(inputs)?.1.rope);
        let (one, other) = (SmallInputs::new(&config, 1)?, SmallInputs::new(&config, 1)?);
        let table = rope(&one.borrowed())?;
        for again in [&one, &other, &one] {
            assert_eq!(rope(&again.borrowed())?.cos().id(), table.cos().id());
        }
        let img_ids = (one.borrowed().img_ids * 2.0)?;
        let inputs = Inputs {
            img_ids: &img_ids,
            ..one.borrowed()
        };
        let wider = rope(&inputs)?;
        assert_ne!(wider.cos().id(), table.cos().id());
        assert!(close(wider.cos(), table.cos(), 1e-2).is_err());
        Ok(())
    }

    #[test]
    fn inputs_that_do_not_fit_are_named() -> Result<()> {
        let config = small_config();
        let flux = random_flux(&config, DType::F32)?;
        let inputs = SmallInputs::new(&config, 2)?;
        let timestep = testing::random("t", 3)?;
        let wrong = Inputs {
            timestep: &timestep,
            ..inputs.borrowed()
        };
        let error = flux
            .forward(&wrong, &mut ())
            .expect_err("three timesteps for two samples");
        assert!(error.to_string().contains("`timestep`"), "{error}");
        let wrong = Inputs {
            img_ids: inputs.borrowed().txt_ids,
            ..inputs.borrowed()
        };
        let error = flux
            .forward(&wrong, &mut ())
            .expect_err("ids of another size");
        assert!(error.to_string().contains("position ids"), "{error}");
        Ok(())
    }

    #[test]
    fn the_observer_sees_a_chain_and_ranges_compose() -> Result<()> {
        #[derive(Default)]
        struct Seen(Vec<(usize, BlockId, Tensor, Tensor)>);
        impl Observer for Seen {
            fn block(
                &mut self,
                index: usize,
                spec: &BlockSpec,
                _: &Conditioning,
                input: &Stream,
                output: &Stream,
            ) -> Result<()> {
                self.0.push((
                    index,
                    spec.id(),
                    input.tokens.clone(),
                    output.tokens.clone(),
                ));
                Ok(())
            }
        }
        let config = small_config();
        let flux = random_flux(&config, DType::F32)?;
        let inputs = SmallInputs::new(&config, 2)?;
        let mut seen = Seen::default();
        let velocity = flux.forward(&inputs.borrowed(), &mut seen)?;
        let ids: Vec<_> = seen.0.iter().map(|(index, id, ..)| (*index, *id)).collect();
        assert_eq!(
            ids,
            [
                (0, BlockId::double(0)),
                (1, BlockId::single(0)),
                (2, BlockId::single(1))
            ]
        );
        for pair in seen.0.windows(2) {
            close(&pair[1].2, &pair[0].3, 0.0)?;
        }
        let (stream, conditioning) = flux.embed(&inputs.borrowed())?;
        let first = flux
            .trunk
            .forward_range(0..1, &stream, &conditioning, &mut ())?;
        let rest = flux
            .trunk
            .forward_range(1..3, &first, &conditioning, &mut ())?;
        close(&flux.head(&rest, &conditioning)?, &velocity, 0.0)?;
        assert!(
            flux.trunk
                .forward_range(2..4, &stream, &conditioning, &mut ())
                .is_err()
        );
        Ok(())
    }

    #[test]
    fn a_removed_block_passes_the_stream_on_and_the_trunk_it_came_from_is_untouched() -> Result<()>
    {
        let config = small_config();
        let flux = random_flux(&config, DType::F32)?;
        let inputs = SmallInputs::new(&config, 1)?;
        let (stream, conditioning) = flux.embed(&inputs.borrowed())?;
        let run =
            |trunk: &Trunk, range| trunk.forward_range(range, &stream, &conditioning, &mut ());
        let ablated = flux.trunk.with_block(1, ReplacementBlock::Remove.into())?;
        close(
            &run(&ablated, 0..2)?.tokens,
            &run(&flux.trunk, 0..1)?.tokens,
            0.0,
        )?;
        assert!(
            close(
                &run(&flux.trunk, 0..2)?.tokens,
                &run(&flux.trunk, 0..1)?.tokens,
                1e-2
            )
            .is_err()
        );
        assert!(
            flux.trunk
                .with_block(3, ReplacementBlock::Remove.into())
                .is_err()
        );
        Ok(())
    }

    #[test]
    fn replacements_are_affine_maps_of_their_stream() -> Result<()> {
        let mut config = small_config();
        config.layout[0] = BlockSpec::Replaced(Replacement {
            replaces: vec![BlockId::double(0)],
            form: Form::Linear,
            joint: false,
        });
        let flux = random_flux(&config, DType::F32)?;
        let inputs = SmallInputs::new(&config, 2)?;
        let (stream, conditioning) = flux.embed(&inputs.borrowed())?;
        let output = flux
            .trunk
            .forward_range(0..1, &stream, &conditioning, &mut ())?;
        let weights = testing::tensors_of(&config)?;
        for (name, x, y) in [
            ("txt", stream.txt()?, output.txt()?),
            ("img", stream.img()?, output.img()?),
        ] {
            let weight = &weights[&format!("double_blocks.0.linear.{name}.weight")];
            let bias = &weights[&format!("double_blocks.0.linear.{name}.bias")];
            let want = (&x + x.broadcast_matmul(&weight.t()?)?.broadcast_add(bias)?)?;
            close(&y, &want, 1e-6)?;
        }
        Ok(())
    }

    #[test]
    fn a_head_size_that_disagrees_is_refused() {
        let mut config = small_config();
        config.num_heads = 4;
        let error = random_flux(&config, DType::F32).expect_err("4 heads of 16 in 32");
        assert!(error.to_string().contains("hidden size 32"), "{error}");
    }
}
