//! The one place that hands addresses to a GPU: compiling, launching. `calls` decides which sizes and threads
//! a kernel gets.
#![expect(
    unsafe_code,
    reason = "a kernel is given addresses, and writes memory that nothing was in before"
)]

use std::collections::HashMap;
use std::marker::PhantomData;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use candle::backend::{BackendDevice, BackendStorage};
use candle::cuda_backend::cudarc::driver::{
    CudaFunction, DevicePtr, LaunchConfig, PushKernelArg, result,
    sys::{CUfunction_attribute_enum, CUmemPool_attribute},
};
use candle::cuda_backend::cudarc::nvrtc::{CompileError, CompileOptions, compile_ptx_with_opts};
use candle::cuda_backend::{CudaDType, WrapErr};
use candle::op::BackpropOp;
use candle::{CudaDevice, CudaStorage, DType, Device, Result, Shape, Storage, Tensor};

use super::super::cpu::by_dtype;
use super::parameters::{Parameters, RowView};

/// What lies between the products, in all formats.
pub(super) static KERNELS: Program = Program::new(
    "fastflux",
    concat!(include_str!("numbers.cu"), include_str!("kernels.cu")),
    &[DType::F32, DType::F16, DType::BF16],
);
/// The backward pass of attention, in the formats that tensor cores multiply as they are.
pub(super) static ATTENTION_BACKWARD: Program = Program::new(
    "fastflux_attention_backward",
    concat!(
        include_str!("numbers.cu"),
        include_str!("attention_backward.cu")
    ),
    &[DType::F16, DType::BF16],
);
/// What calibration asks of the tokens around a block, in the formats whose products are exact in f32.
pub(super) static CHANGE: Program = Program::new(
    "fastflux_change",
    concat!(include_str!("numbers.cu"), include_str!("change.cu")),
    &[DType::F16, DType::BF16],
);
/// The backward passes of what lies between the products, in all formats.
pub(super) static BACKWARD: Program = Program::new(
    "fastflux_backward",
    concat!(include_str!("numbers.cu"), include_str!("backward.cu")),
    &[DType::F32, DType::F16, DType::BF16],
);
/// The oldest GPUs with bfloat16. For newer ones the driver finishes the compilation.
const ARCHITECTURE: &str = "compute_80";
/// Bytes that a device keeps of the memory that it was given, for the tensors that come next: all, unless it is limited.
/// By itself it keeps none whenever it is waited for, and every step would have its memory mapped again.
static KEPT: AtomicU64 = AtomicU64::new(u64::MAX);

/// Sets the most bytes that devices keep, with what is in use: the rest of what is freed goes back whenever one is waited
/// for. Counts for devices that are not in use yet.
pub fn limit_kept_memory(bytes: u64) {
    KEPT.store(bytes, Ordering::Relaxed);
}

/// Bytes of shared memory that a kernel's threads get without asking.
const SHARED: usize = 48 << 10;

/// All kernels of all number formats, loaded on one device.
pub(super) struct Module {
    device: CudaDevice,
    functions: HashMap<(&'static str, DType), CudaFunction>,
}

/// Device memory that nothing has been written to.
pub(super) struct Blank(CudaStorage);

/// Sources that are compiled together, once in a process, when they are first needed.
pub(super) struct Program {
    /// The name candle keeps it under.
    name: &'static str,
    source: &'static str,
    /// How the kernels' names end.
    formats: &'static [DType],
    ptx: OnceLock<std::result::Result<String, String>>,
}

impl Program {
    const fn new(name: &'static str, source: &'static str, formats: &'static [DType]) -> Self {
        Self {
            name,
            source,
            formats,
            ptx: OnceLock::new(),
        }
    }

    /// The kernels as PTX; or why they are not.
    pub(super) fn compiled(&self) -> std::result::Result<&str, String> {
        let ptx = self.ptx.get_or_init(|| {
            let options = CompileOptions {
                arch: Some(ARCHITECTURE),
                name: Some(format!("{}.cu", self.name)),
                options: vec!["--std=c++17".to_owned()],
                ..CompileOptions::default()
            };
            match compile_ptx_with_opts(self.source, options) {
                Ok(ptx) => Ok(ptx.to_src()),
                Err(CompileError::CompileError { log, .. }) => {
                    let log = log.to_string_lossy();
                    Err(log.lines().next().unwrap_or_default().to_owned())
                }
                Err(error) => Err(error.to_string()),
            }
        });
        ptx.as_deref()
            .map_err(|why| format!("NVRTC refuses the kernels: {why}"))
    }
}

impl Module {
    /// Compiles and loads all kernels of [`KERNELS`] named in `kernels`.
    pub(super) fn load(
        device: &CudaDevice,
        kernels: &[&'static str],
    ) -> std::result::Result<Self, String> {
        keep_freed_memory(device);
        forget_events(device);
        Self::from_program(&KERNELS, device, kernels)
    }

    /// Compiles a program and loads its kernels named in `kernels`.
    pub(super) fn from_program(
        program: &'static Program,
        device: &CudaDevice,
        kernels: &[&'static str],
    ) -> std::result::Result<Self, String> {
        let ptx = program.compiled()?;
        let mut functions = HashMap::new();
        for kernel in kernels {
            for dtype in program.formats {
                let name = format!("{kernel}_{}", dtype.as_str());
                let function = device
                    .get_or_load_custom_func(&name, program.name, ptx)
                    .map_err(|why| format!("the driver refuses the kernels: {why}"))?;
                functions.insert((*kernel, *dtype), function.into_cuda_function());
            }
        }
        Ok(Self {
            device: device.clone(),
            functions,
        })
    }

    pub(super) fn device(&self) -> Device {
        Device::Cuda(self.device.clone())
    }

    /// Starts a kernel, `grid` blocks of `block` threads; what is started on this device later waits for it.
    pub(super) fn run<P: Parameters>(
        &self,
        dtype: DType,
        grid: [usize; 3],
        block: [usize; 2],
        parameters: &P,
    ) -> Result<()> {
        self.start(P::KERNEL, dtype, grid, block, 0, parameters)
    }

    /// Starts the kernel `name` as [`Self::run`] does, with `shared` bytes of memory for the threads of a block.
    pub(super) fn start<P: Parameters>(
        &self,
        name: &'static str,
        dtype: DType,
        grid: [usize; 3],
        block: [usize; 2],
        shared: usize,
        parameters: &P,
    ) -> Result<()> {
        if grid.contains(&0) {
            return Ok(()); // nothing to write
        }
        let Some(function) = self.functions.get(&(name, dtype)) else {
            candle::bail!("no kernel `{name}` for {dtype:?}")
        };
        if shared > SHARED {
            let most = CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            function.set_attribute(most, shared as i32).w()?;
        }
        let [x, y, z] = grid.map(|blocks| blocks as u32);
        let [columns, rows] = block.map(|threads| threads as u32);
        let stream = self.device.cuda_stream();
        let mut launch = stream.launch_builder(function);
        launch.arg(parameters);
        // SAFETY: one parameter of the kernel's own layout. `calls` has compared the shapes of all tensors, which are
        // borrowed until here; memory given back afterwards is so in the order of the stream.
        unsafe {
            launch.launch(LaunchConfig {
                grid_dim: (x, y, z),
                block_dim: (columns, rows, 1),
                shared_mem_bytes: shared as u32,
            })
        }
        .w()?;
        Ok(())
    }

    /// Room for `len` numbers.
    pub(super) fn blank(&self, dtype: DType, len: usize) -> Result<Blank> {
        Blank::new(&self.device, dtype, len)
    }
}

impl Blank {
    /// Room for `len` numbers.
    pub(super) fn new(device: &CudaDevice, dtype: DType, len: usize) -> Result<Self> {
        // SAFETY: the kernel or product that this is for writes all of it
        let room = unsafe { device.alloc_uninit(&Shape::from(len), dtype) }?;
        Ok(Self(room))
    }

    pub(super) fn address(&self) -> Result<u64> {
        address(&self.0)
    }

    /// What was written to it.
    pub(super) fn tensor(self, shape: impl Into<Shape>) -> Tensor {
        Tensor::from_storage(Storage::Cuda(self.0), shape, BackpropOp::none(), false)
    }
}

/// See [`KEPT`]. If it cannot be had, everything is slower and nothing else changes.
fn keep_freed_memory(device: &CudaDevice) {
    let threshold = CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
    let mut bytes = KEPT.load(Ordering::Relaxed);
    // SAFETY: the device exists, and this attribute is a number of 64 bits, read before the call returns
    let _ = unsafe {
        result::device::get_mem_pool(device.cuda_stream().context().cu_device()).and_then(|pool| {
            result::mem_pool::set_attribute(pool, threshold, (&raw mut bytes).cast())
        })
    };
}

/// Tensors that are made from now on have no events, of which each otherwise makes and destroys two that are never read.
fn forget_events(device: &CudaDevice) {
    // SAFETY: candle's device has no stream but every thread's own, for which events are neither recorded nor waited for;
    // threads that hand tensors on wait for the device before they do (`Trunk::visit`)
    unsafe { device.disable_event_tracking() }
}

/// Where the first number of a tensor is.
pub(super) fn address_of(x: &Tensor) -> Result<u64> {
    let (storage, layout) = x.storage_and_layout();
    let Storage::Cuda(storage) = &*storage else {
        candle::bail!("a CUDA kernel was given a tensor of another device")
    };
    let skipped = layout.start_offset() * x.dtype().size_in_bytes();
    Ok(address(storage)? + skipped as u64)
}

fn address(storage: &CudaStorage) -> Result<u64> {
    fn of<T: CudaDType>(storage: &CudaStorage) -> Result<u64> {
        let stream = storage.device().cuda_stream();
        Ok(storage.as_cuda_slice::<T>()?.device_ptr(&stream).0)
    }
    if storage.dtype() == DType::F64 {
        return of::<f64>(storage);
    }
    by_dtype!(storage.dtype(), of(storage))
}

impl<'a> RowView<'a> {
    /// Nothing if the numbers of a row do not lie side by side.
    pub(super) fn new(x: &'a Tensor) -> Result<Option<Self>> {
        let (batch, token) = match (x.dims(), x.stride()) {
            ([_, _, w], [b, n, s]) if *s == 1 || *w == 1 => (*b, *n),
            ([_, w], [b, s]) if *s == 1 || *w == 1 => (*b, 0),
            ([w], [s]) if *s == 1 || *w == 1 => (0, 0),
            _ => return Ok(None),
        };
        Ok(Some(Self {
            data: address_of(x)?,
            batch: batch as i64,
            token: token as i64,
            tensor: PhantomData,
        }))
    }
}
