//! Bytes of the host to an NVIDIA GPU at the speed of the bus.
//!
//! The driver copies from ordinary memory with one thread through a small buffer of its own: 9 GB/s on a machine with an
//! H100 whose bus does 55. Here all cores copy into a few page-locked buffers, which the GPU reads while the next one is
//! filled: 36 GB/s there. A file that is read again and again can be page-locked as a whole ([`PageLocked`]), if there is
//! memory for it; the GPU then reads it where it lies, with no work for the CPU.
#![expect(
    unsafe_code,
    reason = "memory of the device that nothing was in before, and copies from page-locked memory"
)]

use std::fmt;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use candle::backend::{BackendDevice, BackendStorage};
use candle::cuda_backend::cudarc::driver::{
    CudaContext, CudaEvent, CudaSlice, DevicePtr, DeviceRepr, result, sys,
};
use candle::cuda_backend::{CudaStorageSlice, DeviceId, WrapErr};
use candle::op::BackpropOp;
use candle::{CudaDevice, CudaStorage, DType, Device, Result, Shape, Storage, Tensor};
use rayon::prelude::*;

/// Bytes of a page-locked buffer, and how many there are: enough to keep the bus and all cores busy.
const BUFFER: usize = 64 << 20;
const BUFFERS: usize = 3;
/// Bytes that one thread copies at a time.
const TASK: usize = 4 << 20;
/// Below this size the driver's own copy is as fast.
const LEAST: usize = 1 << 20;

/// A page-locked buffer.
struct Buffer {
    data: *mut u8,
    /// When the GPU has read what was last put in.
    read: CudaEvent,
}

// SAFETY: the memory belongs to no thread
unsafe impl Send for Buffer {}

impl Buffer {
    fn new(device: &CudaDevice) -> Result<Self> {
        let stream = device.cuda_stream();
        let read = stream.record_event(None).w()?;
        // SAFETY: whatever is in it, it is written before it is read
        let data = unsafe { result::malloc_host(BUFFER, 0) }.w()?;
        Ok(Self {
            data: data.cast(),
            read,
        })
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // SAFETY: it came from `malloc_host`, and the GPU no longer reads it
        let _ = self
            .read
            .synchronize()
            .map(|()| unsafe { result::free_host(self.data.cast()) });
    }
}

/// Those of the device that was used last; one upload runs at a time, as there is one bus.
static BUFFERS_OF: Mutex<Option<(DeviceId, Vec<Buffer>)>> = Mutex::new(None);

/// Memory that is page-locked as long as this lives, so that GPUs read it directly.
pub struct PageLocked {
    range: Range<usize>,
    context: Arc<CudaContext>,
    /// Keeps the memory where it is.
    _owner: Box<dyn Send + Sync>,
}

/// All that is page-locked.
static LOCKED: Mutex<Vec<Range<usize>>> = Mutex::new(Vec::new());

impl PageLocked {
    /// Page-locks `bytes`, read-only, which `owner` keeps alive. `None` off GPUs, and if the driver refuses: uploads then
    /// take the way over buffers.
    pub fn new(bytes: &[u8], owner: Box<dyn Send + Sync>, device: &Device) -> Option<Self> {
        let Device::Cuda(device) = device else {
            return None;
        };
        let stream = device.cuda_stream();
        let context = stream.context().clone();
        context.bind_to_thread().ok()?;
        let range = bytes.as_ptr_range();
        // SAFETY: `owner` keeps the memory alive and unchanged; GPUs only read it
        let locked = unsafe {
            sys::cuMemHostRegister_v2(
                range.start.cast_mut().cast(),
                bytes.len(),
                sys::CU_MEMHOSTREGISTER_READ_ONLY,
            )
        };
        locked.result().ok()?;
        let range = range.start as usize..range.end as usize;
        let mut all = LOCKED.lock().unwrap_or_else(PoisonError::into_inner);
        all.push(range.clone());
        Some(Self {
            range,
            context,
            _owner: owner,
        })
    }
}

impl Drop for PageLocked {
    fn drop(&mut self) {
        let mut all = LOCKED.lock().unwrap_or_else(PoisonError::into_inner);
        all.retain(|range| *range != self.range);
        // copies that other streams still make of it
        let _ = self.context.synchronize();
        // SAFETY: `new` has registered it
        let _ = unsafe { sys::cuMemHostUnregister(self.range.start as *mut _) };
    }
}

impl fmt::Debug for PageLocked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("PageLocked").field(&self.range).finish()
    }
}

fn is_locked(part: &[u8]) -> bool {
    let part = part.as_ptr_range();
    let all = LOCKED.lock().unwrap_or_else(PoisonError::into_inner);
    all.iter()
        .any(|range| range.start <= part.start as usize && part.end as usize <= range.end)
}

/// A tensor of `shape` and `dtype` on `device` from its bytes, which lie in `parts` one after another.
///
/// Work that this thread starts on the device afterwards sees the numbers; another thread must wait for this one's
/// stream first. `parts` may change as soon as this returns, unless they are [`PageLocked`].
///
/// # Errors
/// When the bytes are not as many as the shape asks for, and when the device runs out of memory.
pub fn upload(
    parts: &[&[u8]],
    dtype: DType,
    shape: impl Into<Shape>,
    device: &CudaDevice,
) -> Result<Tensor> {
    let shape = shape.into();
    let bytes: usize = parts.iter().map(|part| part.len()).sum();
    if bytes != shape.elem_count() * dtype.size_in_bytes() {
        candle::bail!("{bytes} bytes for a tensor of {dtype:?} {shape:?}")
    }
    if bytes < LEAST {
        let device = Device::Cuda(device.clone());
        return Tensor::from_raw_buffer(&parts.concat(), dtype, shape.dims(), &device);
    }
    // SAFETY: all of it is written below
    let storage = unsafe { device.alloc_uninit(&shape, dtype) }?;
    copy(parts, address(&storage)?, device)?;
    Ok(Tensor::from_storage(
        Storage::Cuda(storage),
        shape,
        BackpropOp::none(),
        false,
    ))
}

fn copy(parts: &[&[u8]], mut to: u64, device: &CudaDevice) -> Result<()> {
    let stream = device.cuda_stream();
    if parts.iter().all(|part| is_locked(part)) {
        for part in parts {
            // SAFETY: `upload` made room for all parts, which are page-locked and stay as they are
            unsafe { result::memcpy_htod_async(to, part, stream.cu_stream()) }.w()?;
            to += part.len() as u64;
        }
        return Ok(());
    }
    let mut held = BUFFERS_OF.lock().unwrap_or_else(PoisonError::into_inner);
    if held.as_ref().is_none_or(|(id, _)| *id != device.id()) {
        let buffers = (0..BUFFERS).map(|_| Buffer::new(device));
        *held = Some((device.id(), buffers.collect::<Result<_>>()?));
    }
    let Some((_, buffers)) = held.as_mut() else {
        unreachable!("made above")
    };
    let chunks = parts.iter().flat_map(|part| part.chunks(BUFFER));
    for (turn, chunk) in chunks.enumerate() {
        let buffer = &buffers[turn % BUFFERS];
        buffer.read.synchronize().w()?;
        // SAFETY: `BUFFER` bytes, which the GPU has read, and which no other thread sees while `held` is locked
        let room = unsafe { std::slice::from_raw_parts_mut(buffer.data, chunk.len()) };
        let tasks = room.par_chunks_mut(TASK).zip(chunk.par_chunks(TASK));
        tasks.for_each(|(to, from)| to.copy_from_slice(from));
        // SAFETY: `upload` made room for all parts; the buffer is left alone until `read` says that it was read
        unsafe { result::memcpy_htod_async(to, room, stream.cu_stream()) }.w()?;
        buffer.read.record(&stream).w()?;
        to += chunk.len() as u64;
    }
    Ok(())
}

/// Where a storage begins.
fn address(storage: &CudaStorage) -> Result<u64> {
    fn of<T: DeviceRepr>(slice: &CudaSlice<T>, storage: &CudaStorage) -> u64 {
        slice.device_ptr(&storage.device().cuda_stream()).0
    }
    Ok(match &storage.slice {
        CudaStorageSlice::U8(x) => of(x, storage),
        CudaStorageSlice::U32(x) => of(x, storage),
        CudaStorageSlice::I64(x) => of(x, storage),
        CudaStorageSlice::BF16(x) => of(x, storage),
        CudaStorageSlice::F16(x) => of(x, storage),
        CudaStorageSlice::F32(x) => of(x, storage),
        CudaStorageSlice::F64(x) => of(x, storage),
        _ => candle::bail!("tensors of this dtype are not uploaded"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of one byte more than fits the buffers, in parts that end anywhere.
    #[test]
    fn what_is_uploaded_is_what_was_there() {
        let Ok(device) = CudaDevice::new(0) else {
            crate::ui::skip("cuda");
            return;
        };
        let bytes: Vec<u8> = (0..=BUFFER * (BUFFERS + 1))
            .map(|i| (i % 251) as u8)
            .collect();
        let (first, rest) = bytes.split_at(BUFFER + 12_345);
        let tensor = upload(&[first, rest], DType::U8, bytes.len(), &device).unwrap();
        let back = tensor
            .to_device(&Device::Cpu)
            .unwrap()
            .to_vec1::<u8>()
            .unwrap();
        assert!(back == bytes);
        assert!(upload(&[first], DType::U8, bytes.len(), &device).is_err());
    }
}
