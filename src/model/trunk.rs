//! The trunk: a fold over blocks, watched by an observer.

use std::{
    borrow::Cow,
    ops::Range,
    sync::Arc,
    thread::{self, ScopedJoinHandle},
};

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

/// Is shown entries of a trunk: number, what it is, and the block with its weights.
pub(super) type Visitor<'a> = &'a mut dyn FnMut(usize, &BlockSpec, &Block) -> Result<()>;

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

    /// The blocks of `config.layout`; of the original ones those for which `resident` says no are read only when they are
    /// run, so that memory for two of them is enough.
    pub fn offloaded(
        config: &FluxConfig,
        vb: &VarBuilder<'static>,
        resident: &dyn Fn(usize) -> bool,
    ) -> Result<Self> {
        let shared = Arc::new(config.clone());
        let slots = config.slots().into_iter().enumerate();
        let entries = slots.map(|(index, (spec, prefix))| {
            let block = match (spec, prefix) {
                (BlockSpec::Original(_), Some(prefix)) if !resident(index) => {
                    Block::offloaded(&shared, spec, &vb.pp(prefix))
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

    /// Whether an entry of `range` is read whenever it is run.
    pub fn has_offloaded(&self, range: Range<usize>) -> bool {
        let entries = self.entries.get(range).into_iter().flatten();
        entries.into_iter().any(|(_, block)| block.is_offloaded())
    }

    /// Shows the entries of `range` to `visit` in order, each with its weights on the device.
    ///
    /// While it looks at a block, another thread reads the next one that is not on the device, so that of those no more
    /// than two are there at a time.
    pub fn visit(&self, range: Range<usize>, visit: Visitor) -> Result<()> {
        self.check(&range)?;
        self.visit_each(range, visit)
    }

    /// [`Self::visit`] from the last entry of `range` to the first.
    pub fn visit_back(&self, range: Range<usize>, visit: Visitor) -> Result<()> {
        self.check(&range)?;
        self.visit_each(range.rev(), visit)
    }

    fn check(&self, range: &Range<usize>) -> Result<()> {
        match self.entries.get(range.clone()) {
            Some(_) => Ok(()),
            None => candle::bail!("no entries {range:?} in a trunk of {}", self.len()),
        }
    }

    fn visit_each(&self, order: impl Iterator<Item = usize> + Clone, visit: Visitor) -> Result<()> {
        let mut order = order.map(|index| (index, &self.entries[index]));
        thread::scope(|scope| {
            let mut ahead: Option<ScopedJoinHandle<Result<Block>>> = None;
            while let Some((index, (spec, block))) = order.next() {
                let block = if block.is_offloaded() {
                    Cow::Owned(match ahead.take() {
                        None => block.resident()?,
                        Some(reading) => read(reading, spec)?,
                    })
                } else {
                    Cow::Borrowed(block)
                };
                let next = order.clone().find(|(_, (_, b))| b.is_offloaded());
                if let Some((_, (_, next))) = next.filter(|_| ahead.is_none()) {
                    // started is not done on a GPU: if it is slower than reading is, the weights of all blocks that it
                    // has yet to compute would be on it
                    next.synchronize()?;
                    ahead = Some(scope.spawn(|| next.load_on_thread()));
                }
                visit(index, spec, &block)?;
            }
            Ok(())
        })
    }

    /// Runs the entries of `range` on `stream`; blocks that are not on the device come and go as in [`Self::visit`].
    pub fn forward_range(
        &self,
        range: Range<usize>,
        stream: &Stream,
        conditioning: &Conditioning,
        observer: &mut dyn Observer,
    ) -> Result<Stream> {
        let mut stream = stream.clone();
        self.visit(range, &mut |index, spec, block| {
            let output = block.forward(&stream, conditioning)?;
            observer.block(index, spec, conditioning, &stream, &output)?;
            stream = output;
            Ok(())
        })?;
        Ok(stream)
    }

    /// Runs the entries of `range` on each of `streams` in place, block after block, so that a block that is not on the
    /// device is read once for all of them. The same numbers as one stream after another.
    pub fn forward_each(
        &self,
        range: Range<usize>,
        streams: &mut [Stream],
        conditionings: &[&Conditioning],
    ) -> Result<()> {
        if streams.len() != conditionings.len() {
            candle::bail!(
                "{} streams, {} conditionings",
                streams.len(),
                conditionings.len()
            );
        }
        self.visit(range, &mut |_, _, block| {
            for (stream, conditioning) in streams.iter_mut().zip(conditionings) {
                *stream = block.forward(stream, conditioning)?;
            }
            Ok(())
        })
    }
}

/// What the other thread has read.
fn read(reading: ScopedJoinHandle<Result<Block>>, spec: &BlockSpec) -> Result<Block> {
    match reading.join() {
        Ok(block) => block,
        Err(_) => candle::bail!("block {}: the thread that reads it failed", spec.id()),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use candle::{DType, Device, Shape, Tensor};
    use candle_nn::{Init, var_builder::SimpleBackend};

    use super::*;
    use crate::layout::unpruned;
    use crate::model::testing::{SmallInputs, close, random, small_config};
    use crate::model::{Flux, Linear};

    /// Random weights, and which were asked for in which order.
    #[derive(Clone, Default)]
    struct Asked(Arc<Mutex<Vec<String>>>);

    impl Asked {
        fn weights(&self) -> VarBuilder<'static> {
            VarBuilder::from_backend(Box::new(self.clone()), DType::F32, Device::Cpu)
        }

        /// The single blocks that were read so far, one entry for each time.
        fn singles(&self) -> Vec<usize> {
            let names = self.0.lock().unwrap();
            let slot = |name: &String| {
                let rest = name.strip_prefix("single_blocks.")?;
                rest.strip_suffix(".linear1.weight")?.parse().ok()
            };
            names.iter().filter_map(slot).collect()
        }
    }

    impl SimpleBackend for Asked {
        fn get(&self, s: Shape, name: &str, _: Init, _: DType, _: &Device) -> Result<Tensor> {
            self.0.lock().unwrap().push(name.to_owned());
            random(name, s)? * 0.2
        }

        fn get_unchecked(&self, name: &str, _: DType, _: &Device) -> Result<Tensor> {
            candle::bail!("`{name}` without a shape")
        }

        fn contains_tensor(&self, name: &str) -> bool {
            !name.contains('@') // nothing is packed
        }
    }

    /// Fails when a block further ahead than the next one was read.
    struct OneAhead(Asked);

    impl Observer for OneAhead {
        fn block(
            &mut self,
            index: usize,
            _: &BlockSpec,
            _: &Conditioning,
            _: &Stream,
            _: &Stream,
        ) -> Result<()> {
            let furthest = self.0.singles().into_iter().max();
            assert!(furthest <= Some(index + 1), "{furthest:?} at {index}");
            Ok(())
        }
    }

    #[test]
    fn blocks_that_are_read_when_they_are_run_compute_the_same() -> Result<()> {
        let mut config = small_config();
        config.layout = unpruned(0, 6);
        let inputs = SmallInputs::new(&config, 2)?;
        let whole = Flux::new(&config, Asked::default().weights())?;
        let want = whole.forward(&inputs.borrowed(), &mut ())?;
        for resident in [vec![], vec![0, 3], vec![1, 2, 5], vec![0, 1, 2, 3, 4, 5]] {
            let asked = Asked::default();
            let is_resident = |index: usize| resident.contains(&index);
            let flux = Flux::offloaded(&config, &asked.weights(), &is_resident)?;
            assert_eq!(asked.singles(), resident);
            for round in 0..2 {
                let mut observer = OneAhead(asked.clone());
                let observer: &mut dyn Observer = if resident.is_empty() && round == 0 {
                    &mut observer
                } else {
                    &mut ()
                };
                let got = flux.forward(&inputs.borrowed(), observer)?;
                close(&got, &want, 0.0)?;
                asked
                    .0
                    .lock()
                    .unwrap()
                    .retain(|name| !is_resident_name(name, &is_resident));
            }
            // those that stay once, the others in each forward
            let streamed = 6 - resident.len();
            assert_eq!(asked.singles().len(), 2 * streamed, "{resident:?}");
        }
        Ok(())
    }

    #[test]
    fn a_block_is_read_once_for_several_streams() -> Result<()> {
        let mut config = small_config();
        config.layout = unpruned(0, 4);
        let asked = Asked::default();
        let flux = Flux::offloaded(&config, &asked.weights(), &|index| index == 2)?;
        assert!(flux.trunk.has_offloaded(1..3) && !flux.trunk.has_offloaded(2..3));
        asked.0.lock().unwrap().clear();
        let starts =
            [1, 3, 2].map(|batch| flux.embed(&SmallInputs::new(&config, batch)?.borrowed()));
        let (mut streams, conditionings): (Vec<_>, Vec<_>) = starts
            .into_iter()
            .collect::<Result<Vec<_>>>()?
            .into_iter()
            .unzip();
        let want = streams.iter().zip(&conditionings);
        let want: Vec<_> = want
            .map(|(stream, c)| flux.trunk.forward_range(0..4, stream, c, &mut ()))
            .collect::<Result<_>>()?;
        assert_eq!(asked.singles(), [0, 1, 3, 0, 1, 3, 0, 1, 3]);
        asked.0.lock().unwrap().clear();
        let conditionings: Vec<_> = conditionings.iter().collect();
        flux.trunk
            .forward_each(0..4, &mut streams, &conditionings)?;
        assert_eq!(asked.singles(), [0, 1, 3]);
        for (got, want) in streams.iter().zip(&want) {
            close(&got.tokens, &want.tokens, 0.0)?;
        }
        let few = &conditionings[..1];
        assert!(flux.trunk.forward_each(0..4, &mut streams, few).is_err());
        Ok(())
    }

    fn is_resident_name(name: &str, resident: &dyn Fn(usize) -> bool) -> bool {
        let slot = name.strip_prefix("single_blocks.");
        let slot = slot.and_then(|rest| rest.split('.').next()?.parse().ok());
        slot.is_some_and(resident)
    }

    #[test]
    fn an_exchanged_projection_is_used_whether_offloaded_or_not() -> Result<()> {
        let mut config = small_config();
        config.layout = unpruned(0, 2);
        let inputs = SmallInputs::new(&config, 1)?;
        let hidden = config.hidden_size;
        let other = Linear::new(
            random("other", (hidden, hidden + config.mlp_size))?,
            Some(random("bias", hidden)?),
        )?;
        let weights = Asked::default().weights();
        let mut whole = Flux::new(&config, weights.clone())?;
        let before = whole.forward(&inputs.borrowed(), &mut ())?;
        let mut offloaded = Flux::offloaded(&config, &weights, &|_| false)?;
        for flux in [&mut whole, &mut offloaded] {
            let (_, block) = &mut flux.trunk.entries_mut()[1];
            block.exchange("linear2", other.clone())?;
        }
        let got = offloaded.forward(&inputs.borrowed(), &mut ())?;
        close(&got, &whole.forward(&inputs.borrowed(), &mut ())?, 0.0)?;
        assert!(close(&got, &before, 1e-3).is_err(), "nothing changed");
        let (_, block) = &mut whole.trunk.entries_mut()[0];
        assert!(block.exchange("linear3", other).is_err());
        Ok(())
    }
}
