//! The vocabulary every stage shares: which blocks a FLUX transformer has and what stands in their place.
//!
//! No tensors, files or devices here; this module imports nothing of the crate.

mod block;
mod config;

pub use block::{BlockId, BlockIdError, BlockKind, BlockSpec, Form, Replacement};
pub use config::{
    Activation, Family, FluxConfig, ModulationSource, NoiseOrder, ShiftRule, TextModel,
};

/// The ids of all blocks of the unpruned model that a layout comes from, in network order.
pub fn original_ids(layout: &[BlockSpec]) -> impl Iterator<Item = BlockId> + '_ {
    layout.iter().flat_map(|spec| match spec {
        BlockSpec::Original(id) => std::slice::from_ref(id).to_vec(),
        BlockSpec::Replaced(r) => r.replaces.clone(),
    })
}

/// The layout of an unpruned model.
pub fn unpruned(double: usize, single: usize) -> Vec<BlockSpec> {
    let doubles = (0..double).map(BlockId::double);
    let singles = (0..single).map(BlockId::single);
    doubles.chain(singles).map(BlockSpec::Original).collect()
}

/// FLUX.1-dev, for tests that count.
#[cfg(test)]
pub(crate) fn flux_dev() -> FluxConfig {
    FluxConfig {
        in_channels: 64,
        out_channels: 64,
        hidden_size: 3072,
        num_heads: 24,
        context_in_dim: 4096,
        vec_in_dim: 768,
        guidance_embed: true,
        axes_dims: vec![16, 56, 56],
        theta: 10_000.0,
        family: Family::FLUX1,
        mlp_size: 12_288,
        layout: unpruned(19, 38),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn block_ids_print_and_parse() {
        assert_eq!(BlockId::double(7).to_string(), "double.07");
        assert_eq!("single.37".parse::<BlockId>().unwrap(), BlockId::single(37));
        assert_eq!("double.7".parse::<BlockId>().unwrap(), BlockId::double(7));
        for bad in [
            "",
            "double",
            "double.",
            "double.-1",
            "double.+1",
            "triple.1",
            "single.1x",
        ] {
            assert!(bad.parse::<BlockId>().is_err(), "{bad}");
        }
    }

    #[test]
    fn slots_stay_contiguous_when_blocks_are_replaced_or_removed() {
        let mut layout = unpruned(3, 2);
        layout[1] = BlockSpec::Replaced(Replacement {
            replaces: vec![BlockId::double(1)],
            form: Form::Linear,
            joint: false,
        });
        layout[3] = BlockSpec::Replaced(Replacement {
            replaces: vec![BlockId::single(0)],
            form: Form::Remove,
            joint: false,
        });
        let config = FluxConfig {
            in_channels: 64,
            out_channels: 64,
            hidden_size: 8,
            num_heads: 2,
            mlp_size: 32,
            context_in_dim: 4,
            vec_in_dim: 4,
            guidance_embed: false,
            axes_dims: vec![2, 2],
            theta: 1e4,
            family: Family::FLUX1,
            layout,
        };
        let prefixes: Vec<_> = config.slots().into_iter().map(|(_, p)| p).collect();
        let expected = [
            Some("double_blocks.0"),
            Some("double_blocks.1"),
            Some("double_blocks.2"),
            None,
            Some("single_blocks.0"),
        ];
        assert_eq!(prefixes, expected.map(|p| p.map(str::to_owned)));
        assert_eq!(config.original_blocks(BlockKind::Single), 2);
        let json = serde_json::to_string(&config.layout).unwrap();
        assert!(
            json.starts_with(r#"["double.00",{"replaces":["double.01"],"form":"linear"}"#),
            "{json}"
        );
        assert_eq!(
            serde_json::from_str::<Vec<BlockSpec>>(&json).unwrap(),
            config.layout
        );
    }
}
