//! The trunk: a fold over blocks, watched by an observer.

use std::{ops::Range, sync::Arc};

use candle::Result;
use candle_nn::VarBuilder;

use super::block::Block;
use super::stream::{Conditioning, Stream};
use crate::layout::{BlockSpec, FluxConfig};

/// Sees every block's input and output; changes nothing.
pub trait Observer {
    /// Called after block `index` of the trunk.
    fn block(
        &mut self,
        index: usize,
        spec: &BlockSpec,
        conditioning: &Conditioning,
        input: &Stream,
        output: &Stream,
    ) -> Result<()>;
}

/// Looks at nothing.
impl Observer for () {
    fn block(
        &mut self,
        _: usize,
        _: &BlockSpec,
        _: &Conditioning,
        _: &Stream,
        _: &Stream,
    ) -> Result<()> {
        Ok(())
    }
}

/// The blocks in order. Clones share the tensors, so a changed copy costs next to nothing.
#[derive(Clone, Debug)]
pub struct Trunk {
    entries: Vec<(BlockSpec, Block)>,
}

impl Trunk {
    /// Reads the blocks of `config.layout`.
    pub fn load(config: &FluxConfig, vb: &VarBuilder) -> Result<Self> {
        let entries = config.slots().into_iter().map(|(spec, prefix)| {
            let vb = prefix.map_or_else(|| vb.clone(), |prefix| vb.pp(prefix));
            let block = Block::new(config, spec, &vb)?;
            Ok((spec.clone(), block))
        });
        Ok(Self {
            entries: entries.collect::<Result<_>>()?,
        })
    }

    /// The blocks of `config.layout`, those with weights read only when they are run: memory for one at a time.
    pub fn stored(config: &FluxConfig, vb: &VarBuilder<'static>) -> Result<Self> {
        let shared = Arc::new(config.clone());
        let entries = config.slots().into_iter().map(|(spec, prefix)| {
            let block = match (spec, prefix) {
                (BlockSpec::Original(_), Some(prefix)) => {
                    Block::stored(&shared, spec, &vb.pp(prefix))
                }
                (_, Some(prefix)) => Block::new(config, spec, &vb.pp(prefix))?,
                (_, None) => Block::new(config, spec, vb)?,
            };
            Ok((spec.clone(), block))
        });
        Ok(Self {
            entries: entries.collect::<Result<_>>()?,
        })
    }

    /// From blocks at hand.
    pub fn new(entries: Vec<(BlockSpec, Block)>) -> Self {
        Self { entries }
    }

    /// Number of entries; a replacement counts as one, whatever it replaces.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there is no entry.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// The entries in order.
    pub fn entries(&self) -> &[(BlockSpec, Block)] {
        &self.entries
    }

    /// The entries, to attach LoRA or exchange blocks.
    pub fn entries_mut(&mut self) -> &mut Vec<(BlockSpec, Block)> {
        &mut self.entries
    }

    /// A copy with another block at entry `index`. The entry keeps its spec: observers still see what it stood for.
    pub fn with_block(&self, index: usize, block: Block) -> Result<Self> {
        let mut trunk = self.clone();
        match trunk.entries.get_mut(index) {
            Some(entry) => entry.1 = block,
            None => candle::bail!("no entry {index} in a trunk of {}", self.len()),
        }
        Ok(trunk)
    }

    /// Runs the entries of `range` on `stream`.
    pub fn forward_range(
        &self,
        range: Range<usize>,
        stream: &Stream,
        conditioning: &Conditioning,
        observer: &mut dyn Observer,
    ) -> Result<Stream> {
        let Some(entries) = self.entries.get(range.clone()) else {
            candle::bail!("no entries {range:?} in a trunk of {}", self.len())
        };
        let mut stream = stream.clone();
        for (index, (spec, block)) in range.zip(entries) {
            let output = block.forward(&stream, conditioning)?;
            observer.block(index, spec, conditioning, &stream, &output)?;
            stream = output;
        }
        Ok(stream)
    }
}
