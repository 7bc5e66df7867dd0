//! A calibration as a file: the sums of every block, the images they were gathered of, and what made them. Files of
//! shards add up to that of one run. `pass` gathers.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

use anyhow::{Context, Result, bail, ensure};
use candle::{Device, Tensor};

use super::{
    header::Header,
    stats::{BUCKETS, CalibrationStats, Moments, StreamStats, WaitingGram},
};
use crate::{
    checkpoint::{Checkpoint, Source, save},
    files::Blob,
    layout::{BlockId, BlockSpec},
};

/// How the names of the images' tensors begin, and how they began in version 0.1.
const IMAGES: &str = "images";
const OLD_IMAGES: &str = "pictures";

/// The metadata key of the header.
const KEY: &str = "fastflux-statistics";

/// A calibration, whole or in part.
#[derive(Clone, Debug)]
pub struct Calibration {
    /// What made it.
    pub header: Header,
    /// The sums.
    pub stats: CalibrationStats,
    /// Packed latents of the images of each unit, (prompts, tokens, 4 · channels), f32 on the CPU.
    pub images: BTreeMap<usize, Tensor>,
}

impl Calibration {
    /// Nothing gathered yet.
    pub fn new(header: Header, layout: &[BlockSpec]) -> Self {
        let stats = CalibrationStats::new(layout, true)
            .with_products_of(header.products.iter().copied())
            .with_tokens_per_forward(header.recipe.tokens_per_forward);
        Self {
            header,
            stats,
            images: BTreeMap::new(),
        }
    }

    /// All images, (prompts, tokens, 4 · channels).
    ///
    /// # Errors
    /// When units are missing.
    pub fn all_images(&self) -> Result<Tensor> {
        ensure!(self.header.is_complete(), "the calibration is not complete");
        let images: Vec<&Tensor> = self.images.values().collect();
        Ok(Tensor::cat(&images, 0)?)
    }

    /// Adds another part of the same calibration.
    ///
    /// # Errors
    /// When it was made with other settings or holds a unit that is here already.
    pub fn add(&mut self, other: Self) -> Result<()> {
        if let Some(difference) = self.header.difference(&other.header)? {
            bail!("made with other settings ({difference})");
        }
        if let Some(unit) = self.header.done.intersection(&other.header.done).next() {
            bail!("overlapping: unit {unit} is counted already\nhint: give each shard once");
        }
        self.stats.add(other.stats)?;
        self.header.done.extend(other.header.done);
        self.images.extend(other.images);
        Ok(())
    }

    /// Fails at sums that are NaN or infinite, which would spoil all that they are added to.
    ///
    /// # Errors
    /// The message names the file and the block.
    pub fn check_sums(&self, path: &Path) -> Result<()> {
        for block in &self.stats.blocks {
            for (stream, stats) in [("txt", &block.txt), ("img", &block.img)] {
                let Some(sums) = &stats.waiting else { continue };
                for source in [&sums.gram, &sums.cross] {
                    source.largest().ok().with_context(|| {
                        format!(
                            "`{}`: block {}: the sums of {stream} are NaN or infinite\nhint: `fastflux calibrate` makes the file again",
                            path.display(),
                            block.id
                        )
                    })?;
                }
            }
        }
        Ok(())
    }

    /// Writes it to `path`, which appears whole or not at all.
    ///
    /// # Errors
    /// When the folder is not writable or the disk is full.
    pub fn write(&self, path: &Path) -> Result<()> {
        save::write(&self.tensors()?, path)
    }

    /// Writes it to `path` as the output of a command, into a folder that is made if it is missing.
    ///
    /// # Errors
    /// As [`Self::write`].
    pub fn write_output(&self, path: &Path) -> Result<()> {
        if let Some(folder) = path.parent().filter(|f| !f.as_os_str().is_empty()) {
            std::fs::create_dir_all(folder)
                .with_context(|| format!("cannot create `{}`", folder.display()))?;
        }
        self.write(path)
    }

    fn tensors(&self) -> Result<Checkpoint> {
        let mut file = Checkpoint::default();
        let header = serde_json::to_string(&self.header)?;
        file.metadata = BTreeMap::from([(KEY.to_owned(), header)]);
        for block in &self.stats.blocks {
            for (stream, stats) in [("txt", &block.txt), ("img", &block.img)] {
                let mut insert = |what: &str, source: Source| {
                    file.insert(format!("{}.{stream}.{what}", block.id), source);
                };
                insert("moments", Source::dense(&moments_tensor(&stats.buckets)?)?);
                // what lies in files is not read before it is written
                let sums = match (&stats.gram, &stats.waiting) {
                    (Some(sums), _) => Some(WaitingGram {
                        gram: Source::dense(&sums.gram)?,
                        cross: Source::dense(&sums.cross)?,
                        target_sq: sums.target_sq,
                    }),
                    (None, waiting) => waiting.clone(),
                };
                if let Some(sums) = sums {
                    let totals = [sums.target_sq, stats.rows];
                    insert("gram", sums.gram);
                    insert("cross", sums.cross);
                    insert(
                        "totals",
                        Source::dense(&Tensor::new(&totals, &Device::Cpu)?)?,
                    );
                }
            }
        }
        for (unit, images) in &self.images {
            file.insert(format!("{IMAGES}.{unit:06}"), Source::dense(images)?);
        }
        Ok(file)
    }

    /// Reads a statistics file; sums are placed on `device`.
    ///
    /// # Errors
    /// When the file cannot be read, is damaged, or is no statistics file.
    pub fn read(path: &Path, device: &Device) -> Result<Self> {
        let mut out = Self::open(path)?;
        for block in &mut out.stats.blocks {
            for stats in [&mut block.txt, &mut block.img] {
                let waiting = stats.waiting.take();
                stats.gram = waiting.map(|sums| sums.read(device)).transpose()?;
            }
        }
        Ok(out)
    }

    /// The same, but sums stay in the file until they are needed.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub fn open(path: &Path) -> Result<Self> {
        let name = path.display().to_string();
        let (file, header) = open(path)?;
        let ids: BTreeSet<BlockId> = file
            .names()
            .filter_map(|tensor| tensor.strip_suffix(".txt.moments")?.parse().ok())
            .collect();
        let layout: Vec<BlockSpec> = ids.into_iter().map(BlockSpec::Original).collect();
        let mut out = Self::new(header, &layout);
        let wanted: BTreeSet<BlockId> = out.header.products.iter().copied().collect();
        for block in &mut out.stats.blocks {
            for (stream, stats) in [("txt", &mut block.txt), ("img", &mut block.img)] {
                let reader = Reader {
                    name: &name,
                    file: &file,
                    prefix: format!("{}.{stream}", block.id),
                };
                *stats = StreamStats {
                    buckets: moments_of(&reader.finite("moments", &[BUCKETS, 4])?)?,
                    ..StreamStats::default()
                };
                // a shard may have seen no statistics yet
                let has_sums = out.header.is_complete() || reader.has("gram");
                let tokens: f64 = stats.buckets.iter().map(|bucket| bucket.tokens).sum();
                ensure!(
                    has_sums || tokens == 0.0 || !wanted.contains(&block.id),
                    "`{name}` lacks the sums of block {} ({stream}), which saw {tokens} tokens\nhint: `fastflux calibrate` makes the file again",
                    block.id
                );
                if wanted.contains(&block.id) && has_sums {
                    let k = reader.rows("gram")?;
                    let totals = reader.finite("totals", &[2])?.to_vec1::<f64>()?;
                    stats.rows = totals[1];
                    stats.waiting = Some(WaitingGram {
                        gram: reader.checked("gram", &[k, k])?.clone(),
                        cross: reader.checked("cross", &[k, k.saturating_sub(1)])?.clone(),
                        target_sq: totals[0],
                    });
                }
            }
        }
        out.read_images(&name, &file)?;
        Ok(out)
    }

    /// The images of all units that are done, each as many as it has prompts, of the recipe's size.
    fn read_images(&mut self, name: &str, file: &Checkpoint) -> Result<()> {
        let header = &self.header;
        let division = header.validate()?;
        // a token is 16×16 pixels
        let tokens = |side: Option<usize>| side.unwrap_or(0) / 16;
        let tokens = tokens(header.recipe.width).saturating_mul(tokens(header.recipe.height));
        let mut channels = None;
        for unit in &header.done {
            let unit_name = format!("{unit:06}");
            let old = file.contains(&format!("{OLD_IMAGES}.{unit_name}"));
            let prefix = if old { OLD_IMAGES } else { IMAGES }.to_owned();
            let reader = Reader { name, file, prefix };
            let source = reader.source(&unit_name)?;
            let channels = *channels.get_or_insert(source.shape().last().copied().unwrap_or(0));
            let shape = [division.prompts_of(*unit).len(), tokens, channels];
            let images = reader.images(&unit_name, &shape)?;
            self.images.insert(*unit, images);
        }
        Ok(())
    }
}

/// Reads the tensors of one stream of one block.
struct Reader<'a> {
    name: &'a str,
    file: &'a Checkpoint,
    prefix: String,
}

impl Reader<'_> {
    fn has(&self, what: &str) -> bool {
        self.file.contains(&format!("{}.{what}", self.prefix))
    }

    fn source(&self, what: &str) -> Result<&Source> {
        let tensor = format!("{}.{what}", self.prefix);
        let source = self.file.get(&tensor);
        source.with_context(|| format!("`{}` has no tensor `{tensor}`", self.name))
    }

    fn rows(&self, what: &str) -> Result<usize> {
        Ok(self.source(what)?.shape().first().copied().unwrap_or(0))
    }

    /// Numbers in f64 of this shape.
    fn finite(&self, what: &str, shape: &[usize]) -> Result<Tensor> {
        let tensor = self.checked(what, shape)?.tensor(&Device::Cpu)?;
        let sum = tensor.sum_all()?.to_scalar::<f64>()?;
        self.ensure_finite(what, sum)?;
        Ok(tensor)
    }

    /// Images in f32 of this shape.
    fn images(&self, what: &str, shape: &[usize]) -> Result<Tensor> {
        let source = self.of_form(what, shape, safetensors::Dtype::F32)?;
        let tensor = source.tensor(&Device::Cpu)?;
        let sum = tensor.sum_all()?.to_scalar::<f32>()?;
        self.ensure_finite(what, f64::from(sum))?;
        Ok(tensor)
    }

    fn ensure_finite(&self, what: &str, sum: f64) -> Result<()> {
        ensure!(
            sum.is_finite(),
            "`{}`: tensor `{}.{what}` holds NaN or infinite numbers\nhint: `fastflux calibrate` makes the file again",
            self.name,
            self.prefix
        );
        Ok(())
    }

    fn checked(&self, what: &str, shape: &[usize]) -> Result<&Source> {
        self.of_form(what, shape, safetensors::Dtype::F64)
    }

    fn of_form(&self, what: &str, shape: &[usize], dtype: safetensors::Dtype) -> Result<&Source> {
        let source = self.source(what)?;
        ensure!(
            source.shape() == shape && source.format() == dtype.into(),
            "`{}`: tensor `{}.{what}`: expected {shape:?} in {dtype:?}, found {:?} in {}",
            self.name,
            self.prefix,
            source.shape(),
            source.format()
        );
        Ok(source)
    }
}

/// Opens a statistics file and reads its header only.
///
/// # Errors
/// When the file cannot be read, is damaged, or is no statistics file.
pub fn open(path: &Path) -> Result<(Checkpoint, Header)> {
    let name = path.display().to_string();
    let file = Checkpoint::from_blob(&name, &Blob::map(path)?)?;
    let text = file.metadata.get(KEY).with_context(|| {
        format!("`{name}` is not a statistics file\nhint: `fastflux calibrate` makes one")
    })?;
    let value: serde_json::Value = serde_json::from_str(text)
        .with_context(|| format!("`{name}`: its statistics header is damaged"))?;
    let version = value["version"].as_u64().unwrap_or(0);
    ensure!(
        version <= u64::from(Header::VERSION),
        "`{name}` was written by a newer fastflux (statistics version {version}, this build reads {})\nhint: update fastflux",
        Header::VERSION
    );
    let header: Header = serde_json::from_value(value)
        .with_context(|| format!("`{name}`: its statistics header is damaged"))?;
    header.validate().with_context(|| {
        format!(
            "`{name}`: its statistics header is damaged\nhint: `fastflux calibrate` makes the file again"
        )
    })?;
    Ok((file, header))
}

fn moments_tensor(buckets: &[Moments; BUCKETS]) -> Result<Tensor> {
    let values: Vec<f64> = buckets
        .iter()
        .flat_map(|m| [m.tokens, m.input_sq, m.change_sq, m.cosine])
        .collect();
    Ok(Tensor::from_vec(values, (BUCKETS, 4), &Device::Cpu)?)
}

fn moments_of(tensor: &Tensor) -> Result<[Moments; BUCKETS]> {
    let mut out = [Moments::default(); BUCKETS];
    for (bucket, row) in out.iter_mut().zip(tensor.to_vec2::<f64>()?) {
        *bucket = Moments {
            tokens: row[0],
            input_sq: row[1],
            change_sq: row[2],
            cosine: row[3],
        };
    }
    Ok(out)
}

#[cfg(test)]
mod tests;
