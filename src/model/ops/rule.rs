//! What the nodes of a gradient graph do on the way back, by the tensors that they put out: candle keeps to itself which
//! operation a tensor comes from.

use std::cell::RefCell;
use std::collections::HashMap;
use std::sync::{Arc, Weak};

use candle::{Result, Tensor, TensorId};

/// From the result and its gradient to the gradients of all inputs, in their order; `None` for those that are not asked for.
pub(super) type Backward =
    Box<dyn Fn(&Tensor, &Tensor) -> Result<Vec<Option<Tensor>>> + Send + Sync>;

/// What a node does on the way back.
pub(super) struct Rule {
    /// The tracked inputs: their places among all, and who they are.
    pub(super) inputs: Vec<(usize, TensorId)>,
    pub(super) backward: Backward,
}

impl Rule {
    /// The gradients of the tracked inputs, in their order, from the result and its gradient.
    pub(super) fn gradients(&self, result: &Tensor, grad: &Tensor) -> Result<Vec<Tensor>> {
        let mut all = (self.backward)(&result.detach(), &grad.detach())?;
        let each = self.inputs.iter().map(|(index, _)| {
            let grad = all.get_mut(*index).and_then(Option::take);
            grad.ok_or_else(|| {
                let why = format!("no gradient for input {index} of an operation");
                candle::Error::Msg(why)
            })
        });
        each.collect()
    }
}

/// Rules after which those are forgotten whose graphs are gone.
const MANY: usize = 1 << 12;

thread_local! {
    /// Of this thread's operations, while their graphs exist.
    static RULES: RefCell<HashMap<TensorId, Weak<Rule>>> = RefCell::default();
}

/// Remembers what `output` comes from.
pub(super) fn register(output: &Tensor, rule: &Arc<Rule>) {
    RULES.with_borrow_mut(|rules| {
        if rules.len() >= MANY && rules.len().is_multiple_of(MANY) {
            rules.retain(|_, rule| rule.strong_count() > 0);
        }
        rules.insert(output.id(), Arc::downgrade(rule));
    });
}

pub(super) fn rule(of: &Tensor) -> Option<Arc<Rule>> {
    RULES.with_borrow(|rules| rules.get(&of.id()).and_then(Weak::upgrade))
}

#[cfg(test)]
mod tests {
    use candle::Var;

    use super::super::narrow;
    use super::*;

    #[test]
    fn rules_are_forgotten_with_their_graphs() -> Result<()> {
        let x = Var::zeros((1, 2, 4), candle::DType::F32, &candle::Device::Cpu)?;
        for _ in 0..MANY + 2 {
            narrow(&x, 1, 0, 1)?;
        }
        let left =
            RULES.with_borrow(|rules| rules.values().filter(|r| r.strong_count() > 0).count());
        assert_eq!(left, 0);
        assert!(RULES.with_borrow(HashMap::len) < MANY + 2);
        Ok(())
    }
}
