//! Values computed outside of candle's graph, put into it with a backward pass of their own. What the passes compute
//! stands next to the operations.
//!
//! A forward of fused kernels or of several tensor operations becomes one node: nothing in between is kept, and the
//! gradient is what `backward` says. Candle's own products, norms and softmax keep every intermediate result and form
//! the gradients of frozen weights too, which costs half of the arithmetic of a training step.

use std::sync::{Arc, Mutex, PoisonError};

use candle::backend::BackendStorage;
use candle::backprop::GradStore;
use candle::{
    CpuStorage, CudaStorage, CustomOp1, CustomOp2, CustomOp3, Layout, MetalStorage, Result, Shape,
    Storage, Tensor, Var,
};

use super::rule::{Rule, register};

/// `output`, computed from `inputs` (and anything else) without a graph, with the given backward pass: from the gradient
/// of the output to those of all inputs in order. At most three inputs may be tracked.
pub(super) fn custom_op(
    inputs: &[&Tensor],
    output: Tensor,
    backward: impl Fn(&Tensor) -> Result<Vec<Option<Tensor>>> + Send + Sync + 'static,
) -> Result<Tensor> {
    custom_op_of_result(inputs, output, move |_, grad| backward(grad))
}

/// The same, for a backward pass that looks at the result too: if it kept it, there would be two of it.
pub(super) fn custom_op_of_result(
    inputs: &[&Tensor],
    output: Tensor,
    backward: impl Fn(&Tensor, &Tensor) -> Result<Vec<Option<Tensor>>> + Send + Sync + 'static,
) -> Result<Tensor> {
    let tracked: Vec<usize> = (0..inputs.len())
        .filter(|i| inputs[*i].track_op())
        .collect();
    if tracked.is_empty() {
        return Ok(output);
    }
    let rule = Arc::new(Rule {
        inputs: tracked.iter().map(|i| (*i, inputs[*i].id())).collect(),
        backward: Box::new(backward),
    });
    let node = Node {
        shape: output.shape().clone(),
        output: Mutex::new(Some(whole(&output)?)),
        rule: rule.clone(),
    };
    let result = match tracked.as_slice() {
        [a] => inputs[*a].apply_op1(node),
        [a, b] => inputs[*a].apply_op2(inputs[*b], node),
        [a, b, c] => inputs[*a].apply_op3(inputs[*b], inputs[*c], node),
        more => candle::bail!("an operation with {} tracked inputs", more.len()),
    }?;
    register(&result, &rule);
    Ok(result)
}

/// The same numbers from the beginning of a storage: on GPUs candle copies storages without regard to where in them a
/// tensor lies.
fn whole(x: &Tensor) -> Result<Tensor> {
    if !x.device().is_cpu() && x.layout().start_offset() > 0 {
        return x.force_contiguous();
    }
    x.contiguous()
}

/// The gradients of all variables that `output` depends on, given its own, by candle's backward pass.
pub(super) fn by_candle(output: &Tensor, grad: &Tensor) -> Result<GradStore> {
    // the sum of their products would be another scalar to begin from; it would be read and written for it
    let (zero, grad) = (
        Tensor::zeros((), output.dtype(), output.device())?,
        grad.clone(),
    );
    custom_op(&[output], zero, move |_| Ok(vec![Some(grad.clone())]))?.backward()
}

/// The gradients of `inputs` by candle's own rules: `forward` is run once more on them in a graph.
pub(super) fn by_recomputing(
    inputs: &[&Tensor],
    grad: &Tensor,
    forward: impl Fn(&[Tensor]) -> Result<Tensor>,
) -> Result<Vec<Option<Tensor>>> {
    let vars = inputs.iter().map(|x| Var::from_tensor(&x.detach()));
    let vars = vars.collect::<Result<Vec<_>>>()?;
    let tensors: Vec<Tensor> = vars.iter().map(|v| v.as_tensor().clone()).collect();
    let output = forward(&tensors)?;
    let mut grads = by_candle(&output, grad)?;
    Ok(vars.iter().map(|v| grads.remove(v)).collect())
}

struct Node {
    shape: Shape,
    /// Taken by the forward.
    output: Mutex<Option<Tensor>>,
    rule: Arc<Rule>,
}

impl Node {
    fn storage(&self) -> Result<Storage> {
        let mut output = self.output.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(output) = output.take() else {
            candle::bail!("an operation's result was asked for twice")
        };
        let (storage, layout) = output.storage_and_layout();
        match &*storage {
            // a result that is a part of a larger tensor is copied on its own
            Storage::Cpu(storage) => Ok(Storage::Cpu(part(storage, layout)?)),
            Storage::Cuda(storage) => Ok(Storage::Cuda(storage.try_clone(layout)?)),
            Storage::Metal(storage) => Ok(Storage::Metal(storage.try_clone(layout)?)),
        }
    }

    fn cpu(&self) -> Result<(CpuStorage, Shape)> {
        match self.storage()? {
            Storage::Cpu(storage) => Ok((storage, self.shape.clone())),
            _ => elsewhere(),
        }
    }

    fn cuda(&self) -> Result<(CudaStorage, Shape)> {
        match self.storage()? {
            Storage::Cuda(storage) => Ok((storage, self.shape.clone())),
            _ => elsewhere(),
        }
    }

    fn metal(&self) -> Result<(MetalStorage, Shape)> {
        match self.storage()? {
            Storage::Metal(storage) => Ok((storage, self.shape.clone())),
            _ => elsewhere(),
        }
    }

    /// The gradients of the tracked inputs.
    fn gradients<const N: usize>(
        &self,
        result: &Tensor,
        grad: &Tensor,
    ) -> Result<[Option<Tensor>; N]> {
        let mut all = self.rule.gradients(result, grad)?.into_iter();
        Ok([(); N].map(|()| all.next()))
    }
}

fn elsewhere<T>() -> Result<T> {
    candle::bail!("an operation's inputs and result are on different devices")
}

/// The elements of a contiguous layout.
fn part(storage: &CpuStorage, layout: &Layout) -> Result<CpuStorage> {
    let Some((start, end)) = layout.contiguous_offsets() else {
        candle::bail!("an operation's result is not contiguous")
    };
    Ok(match storage {
        CpuStorage::F32(x) => CpuStorage::F32(x[start..end].to_vec()),
        CpuStorage::F64(x) => CpuStorage::F64(x[start..end].to_vec()),
        CpuStorage::F16(x) => CpuStorage::F16(x[start..end].to_vec()),
        CpuStorage::BF16(x) => CpuStorage::BF16(x[start..end].to_vec()),
        _ => candle::bail!("an operation's result is no floating-point tensor"),
    })
}

const NAME: &str = "fastflux";

/// The name and the forwards of a node, with an operand's storage and layout for each input: the result is there already.
macro_rules! forwards {
    ($($storage:ident $layout:ident),+) => {
        fn name(&self) -> &'static str {
            NAME
        }
        fn cpu_fwd(&self, $($storage: &CpuStorage, $layout: &Layout),+) -> Result<(CpuStorage, Shape)> {
            self.cpu()
        }
        fn cuda_fwd(&self, $($storage: &CudaStorage, $layout: &Layout),+) -> Result<(CudaStorage, Shape)> {
            self.cuda()
        }
        fn metal_fwd(&self, $($storage: &MetalStorage, $layout: &Layout),+) -> Result<(MetalStorage, Shape)> {
            self.metal()
        }
    };
}

impl CustomOp1 for Node {
    forwards!(_a _a_layout);
    fn bwd(&self, _: &Tensor, result: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let [a] = self.gradients(result, grad)?;
        Ok(a)
    }
}

impl CustomOp2 for Node {
    forwards!(_a _a_layout, _b _b_layout);
    fn bwd(
        &self,
        _: &Tensor,
        _: &Tensor,
        result: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let [a, b] = self.gradients(result, grad)?;
        Ok((a, b))
    }
}

impl CustomOp3 for Node {
    forwards!(_a _a_layout, _b _b_layout, _c _c_layout);
    fn bwd(
        &self,
        _: &Tensor,
        _: &Tensor,
        _: &Tensor,
        result: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let [a, b, c] = self.gradients(result, grad)?;
        Ok((a, b, c))
    }
}
