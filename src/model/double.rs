//! The double block: text and image tokens with weights of their own, meeting in attention.

use candle::{Result, Tensor};
use candle_nn::VarBuilder;

use super::linear::Linear;
use super::modulation::BlockModulation;
use super::ops::{self, Branch, Norms, Projected};
use super::output_projection::OutputProjection;
use super::stream::{Conditioning, SharedParts, Stream};
use crate::layout::{Activation, FluxConfig};

/// BFL `DoubleStreamBlock`, diffusers `FluxTransformerBlock`; for each of the two streams
/// `x ← x + gate₁ · proj(attention)`, then `x ← x + gate₂ · mlp((1 + scale₂) · norm(x) + shift₂)` ([BFL][forward]).
///
/// [forward]: https://github.com/black-forest-labs/flux/blob/802fb4713906133fcbd0d8dc5351620ca4773036/src/flux/modules/layers.py#L158-L191
#[derive(Clone, Debug)]
pub struct DoubleBlock {
    img: Half,
    txt: Half,
    num_heads: usize,
}

/// The weights of one of the two streams.
#[derive(Clone, Debug)]
struct Half {
    modulation: BlockModulation<6>,
    qkv: Linear,
    norms: Norms,
    proj: Linear,
    mlp_in: Linear,
    activation: Activation,
    mlp_out: Linear,
}

impl Half {
    fn new(
        config: &FluxConfig,
        vb: &VarBuilder,
        stream: &str,
        shared: fn(&SharedParts) -> &[Tensor; 6],
    ) -> Result<Self> {
        let (hidden, biases) = (config.hidden_size, config.family.biases);
        let (mlp_in, mlp_out) = (config.mlp_in_size(), config.mlp_size);
        let part = |name: &str| vb.pp(format!("{stream}_{name}"));
        let attn = part("attn");
        Ok(Self {
            modulation: BlockModulation::load(config, shared, &part("mod").pp("lin"))?,
            qkv: Linear::load(hidden, 3 * hidden, biases, &attn.pp("qkv"))?,
            norms: load_norms(config, &attn.pp("norm"))?,
            proj: Linear::load(hidden, hidden, biases, &attn.pp("proj"))?,
            mlp_in: Linear::load(hidden, mlp_in, biases, &part("mlp").pp("0"))?,
            activation: config.family.activation,
            mlp_out: Linear::load(mlp_out, hidden, biases, &part("mlp").pp("2"))?,
        })
    }

    /// After attention: adds its projection, then the MLP up to its output projection.
    fn after(
        &self,
        name: &'static str,
        x: &Tensor,
        attended: &Tensor,
        [gate, shift, scale, last_gate]: [&Tensor; 4],
    ) -> Result<OutputProjection> {
        let y = self.proj.product(attended)?;
        let x = ops::gated_residual(&[Branch {
            x,
            y: &y,
            bias: self.proj.bias(),
            gate: Some(gate),
        }])?;
        let normed = ops::norm_modulate(&x, shift, scale)?;
        let z = self.mlp_in.activated(self.activation, &normed)?;
        Ok(OutputProjection {
            name,
            x,
            z,
            gate: last_gate.clone(),
        })
    }
}

/// Reads the weights of the RMS norms below `vb` (`query_norm.scale`, `key_norm.scale`).
pub(super) fn load_norms(config: &FluxConfig, vb: &VarBuilder) -> Result<Norms> {
    let size = config.axes_dims.iter().sum::<usize>();
    Ok(Norms {
        query: vb.get(size, "query_norm.scale")?,
        key: vb.get(size, "key_norm.scale")?,
    })
}

impl DoubleBlock {
    /// Reads the block whose tensors are below `vb` (`img_attn.qkv.weight` and so on).
    pub fn new(config: &FluxConfig, vb: &VarBuilder) -> Result<Self> {
        Ok(Self {
            img: Half::new(config, vb, "img", |shared| &shared.img)?,
            txt: Half::new(config, vb, "txt", |shared| &shared.txt)?,
            num_heads: config.num_heads,
        })
    }

    /// The modulation projections of text and image tokens; `None` if all blocks share theirs.
    pub(super) fn modulations(&self) -> Option<[&Linear; 2]> {
        Some([self.txt.modulation.linear()?, self.img.modulation.linear()?])
    }

    /// One step of the fold.
    pub fn forward(&self, stream: &Stream, conditioning: &Conditioning) -> Result<Stream> {
        let [txt, img] = self.output_projections(stream, conditioning)?;
        Ok(stream.with_tokens(self.project(&txt, &img)?))
    }

    /// The rest of [`Self::forward`] behind [`Self::output_projections`].
    pub(super) fn project(&self, txt: &OutputProjection, img: &OutputProjection) -> Result<Tensor> {
        let txt_y = self.txt.mlp_out.product(&txt.z)?;
        let img_y = self.img.mlp_out.product(&img.z)?;
        ops::gated_residual(&[
            txt.branch(&txt_y, &self.txt.mlp_out),
            img.branch(&img_y, &self.img.mlp_out),
        ])
    }

    /// What the output projections `txt_mlp.2` and `img_mlp.2` are applied to.
    pub(super) fn output_projections(
        &self,
        stream: &Stream,
        conditioning: &Conditioning,
    ) -> Result<[OutputProjection; 2]> {
        let Self {
            img,
            txt,
            num_heads,
        } = self;
        let (img_x, txt_x) = (stream.img_view()?, stream.txt_view()?);
        let [
            img_shift1,
            img_scale1,
            img_gate1,
            img_shift2,
            img_scale2,
            img_gate2,
        ] = img.modulation.forward(conditioning)?;
        let [
            txt_shift1,
            txt_scale1,
            txt_gate1,
            txt_shift2,
            txt_scale2,
            txt_gate2,
        ] = txt.modulation.forward(conditioning)?;

        // (batch, tokens of the stream, 3·hidden)
        let img_qkv = img
            .qkv
            .product(&ops::norm_modulate(&img_x, &img_shift1, &img_scale1)?)?;
        let txt_qkv = txt
            .qkv
            .product(&ops::norm_modulate(&txt_x, &txt_shift1, &txt_scale1)?)?;
        let attended = ops::attend(
            &[
                Projected {
                    qkv: &txt_qkv,
                    bias: txt.qkv.bias(),
                    norms: &txt.norms,
                },
                Projected {
                    qkv: &img_qkv,
                    bias: img.qkv.bias(),
                    norms: &img.norms,
                },
            ],
            *num_heads,
            &conditioning.rope,
        )?;
        drop((img_qkv, txt_qkv));
        // (batch, txt + img, hidden)
        let attended = stream.with_tokens(attended);

        let img = img.after(
            "img_mlp.2",
            &img_x,
            &attended.img_view()?,
            [&img_gate1, &img_shift2, &img_scale2, &img_gate2],
        )?;
        let txt = txt.after(
            "txt_mlp.2",
            &txt_x,
            &attended.txt_view()?,
            [&txt_gate1, &txt_shift2, &txt_scale2, &txt_gate2],
        )?;
        Ok([txt, img])
    }

    /// Every projection with its name below the block.
    pub fn linears_mut(&mut self) -> Vec<(&'static str, &mut Linear)> {
        let Self { img, txt, .. } = self;
        let mut out = Vec::with_capacity(10);
        out.extend(img.modulation.linear_mut().map(|l| ("img_mod.lin", l)));
        out.extend([
            ("img_attn.qkv", &mut img.qkv),
            ("img_attn.proj", &mut img.proj),
            ("img_mlp.0", &mut img.mlp_in),
            ("img_mlp.2", &mut img.mlp_out),
        ]);
        out.extend(txt.modulation.linear_mut().map(|l| ("txt_mod.lin", l)));
        out.extend([
            ("txt_attn.qkv", &mut txt.qkv),
            ("txt_attn.proj", &mut txt.proj),
            ("txt_mlp.0", &mut txt.mlp_in),
            ("txt_mlp.2", &mut txt.mlp_out),
        ]);
        out
    }
}
