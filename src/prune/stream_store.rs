//! Where the token streams of the sequential fits wait between blocks: on the device, in host memory, and in a temporary
//! file as soon as there are too many. FLUX.1-dev at 1024×1024 has 14 GB of them for 256 noised latents.

use std::{
    fs::File,
    io::{Read, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use candle::{DType, Device, Tensor};
use safetensors::View;

use crate::{model::Stream, ui};

/// Takes streams and gives places.
#[derive(Debug)]
pub(super) struct StreamStore {
    /// Where streams in memory wait.
    device: Device,
    /// Bytes that may still wait in memory; `None`: no limit.
    room: Option<u64>,
    /// Folder of the temporary file.
    folder: PathBuf,
    file: Option<File>,
    /// Bytes of the file that are taken.
    end: u64,
}

/// Where one stream waits.
#[derive(Debug)]
pub(super) enum Place {
    Memory(Stream),
    File {
        start: u64,
        dtype: DType,
        shape: Vec<usize>,
        txt_len: usize,
    },
}

impl StreamStore {
    /// Streams stay on `device`, `room` bytes of them (`None`: all); the others go to a file in `folder` that nobody else sees
    /// and that is gone as soon as this is dropped or the process ends.
    pub(super) fn new(device: Device, room: Option<u64>, folder: &Path) -> Self {
        Self {
            device,
            room,
            folder: folder.to_owned(),
            file: None,
            end: 0,
        }
    }

    /// Puts `stream` into a new place.
    ///
    /// # Errors
    /// When the temporary file cannot be made or written.
    pub(super) fn put(&mut self, stream: &Stream) -> Result<Place> {
        let bytes = bytes(stream);
        match &mut self.room {
            Some(room) if *room < bytes => {
                let place = Place::File {
                    start: self.end,
                    dtype: stream.tokens.dtype(),
                    shape: stream.tokens.dims().to_vec(),
                    txt_len: stream.txt_len,
                };
                self.write(self.end, stream)?;
                self.end += bytes;
                Ok(place)
            }
            room => {
                if let Some(room) = room {
                    *room -= bytes;
                }
                Ok(Place::Memory(moved(stream, &self.device)?))
            }
        }
    }

    /// Puts `stream` where another of its shape waited.
    ///
    /// # Errors
    /// When the temporary file cannot be written.
    pub(super) fn replace(&mut self, place: &mut Place, stream: &Stream) -> Result<()> {
        match place {
            Place::Memory(waiting) => *waiting = moved(stream, &self.device)?,
            Place::File { start, .. } => self.write(*start, stream)?,
        }
        Ok(())
    }

    /// The stream of `place` on `device`.
    ///
    /// # Errors
    /// When the temporary file cannot be read, or memory is short.
    pub(super) fn load(&mut self, place: &Place, device: &Device) -> Result<Stream> {
        match place {
            Place::Memory(stream) => moved(stream, device),
            Place::File {
                start,
                dtype,
                shape,
                txt_len,
            } => {
                let count: usize = shape.iter().product();
                let mut data = vec![0; count * dtype.size_in_bytes()];
                let folder = self.folder.display().to_string();
                let file = self.file()?;
                file.seek(SeekFrom::Start(*start))
                    .and_then(|_| file.read_exact(&mut data))
                    .with_context(|| format!("cannot read the temporary file in `{folder}`"))?;
                Ok(Stream {
                    tokens: Tensor::from_raw_buffer(&data, *dtype, shape, device)?,
                    txt_len: *txt_len,
                })
            }
        }
    }

    fn write(&mut self, start: u64, stream: &Stream) -> Result<()> {
        let tokens = stream.tokens.to_device(&Device::Cpu)?.contiguous()?;
        let folder = self.folder.display().to_string();
        let file = self.file()?;
        file.seek(SeekFrom::Start(start))
            .and_then(|_| file.write_all(&View::data(&&tokens)))
            .with_context(|| {
                format!(
                    "cannot write token streams to a temporary file in `{folder}`, of {} so far\nhint: --output on a disk with more room, or fewer --num-prompts",
                    ui::bytes(start as f64)
                )
            })
    }

    fn file(&mut self) -> Result<&mut File> {
        if self.file.is_none() {
            let file = tempfile::tempfile_in(&self.folder).with_context(|| {
                format!(
                    "cannot make a temporary file in `{}`",
                    self.folder.display()
                )
            })?;
            self.file = Some(file);
        }
        self.file.as_mut().context("the temporary file is open")
    }
}

/// `stream` on `device`.
fn moved(stream: &Stream, device: &Device) -> Result<Stream> {
    Ok(Stream {
        tokens: stream.tokens.to_device(device)?,
        txt_len: stream.txt_len,
    })
}

fn bytes(stream: &Stream) -> u64 {
    (stream.tokens.elem_count() * stream.tokens.dtype().size_in_bytes()) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stream(value: f32, dtype: DType) -> Stream {
        let tokens = Tensor::full(value, (1, 6, 4), &Device::Cpu).unwrap();
        Stream {
            tokens: tokens.to_dtype(dtype).unwrap(),
            txt_len: 2,
        }
    }

    fn value(stream: &Stream) -> f32 {
        let tokens = stream.tokens.to_dtype(DType::F32).unwrap();
        assert_eq!((tokens.dims(), stream.txt_len), ([1, 6, 4].as_slice(), 2));
        tokens.max_all().unwrap().to_scalar().unwrap()
    }

    #[test]
    fn what_does_not_fit_into_memory_comes_back_from_the_file() {
        let folder = tempfile::tempdir().unwrap();
        for dtype in [DType::F32, DType::BF16] {
            let one = bytes(&stream(0.0, dtype));
            let mut store = StreamStore::new(Device::Cpu, Some(2 * one), folder.path());
            let mut places: Vec<Place> = (0..5)
                .map(|i| store.put(&stream(i as f32, dtype)).unwrap())
                .collect();
            let in_file = |place: &&Place| matches!(place, Place::File { .. });
            assert_eq!(places.iter().filter(in_file).count(), 3);
            store.replace(&mut places[3], &stream(30.0, dtype)).unwrap();
            store.replace(&mut places[0], &stream(7.0, dtype)).unwrap();
            let got: Vec<f32> = places
                .iter()
                .map(|place| value(&store.load(place, &Device::Cpu).unwrap()))
                .collect();
            assert_eq!(got, [7.0, 1.0, 2.0, 30.0, 4.0]);
        }
        assert_eq!(
            folder.path().read_dir().unwrap().count(),
            0,
            "nobody sees it"
        );
    }

    #[test]
    fn a_folder_that_is_not_there_is_named() {
        let mut store = StreamStore::new(Device::Cpu, Some(0), Path::new("no/such"));
        let error = store.put(&stream(1.0, DType::F32)).unwrap_err();
        assert!(error.to_string().contains("no/such"), "{error}");
    }
}
