//! The uniform block of the kernels of linear maps.

use super::LinearProblem;
use crate::error::Operand;
use crate::params::ParamLayout;

/// Runtime parameters; see the WGSL twin for what each means.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, bytemuck::Pod, bytemuck::Zeroable)]
pub(crate) struct LinearParams {
    rows: u32,
    inputs: u32,
    outputs: u32,
    groups: u32,
    heads_q: u32,
    head_first: u32,
    row_first: u32,
    x: ParamLayout,
    w: ParamLayout,
    bias: ParamLayout,
    y: ParamLayout,
}

impl LinearParams {
    /// `first` gives the element that the binding of an operand begins with.
    pub(crate) fn new(problem: &LinearProblem, groups: u32, first: impl Fn(Operand) -> usize) -> Self {
        let layout = |operand| {
            let of = problem.layout(operand);
            of.map_or(ParamLayout::default(), |(layout, _)| {
                ParamLayout::new(layout, problem.shape(operand), first(operand))
            })
        };
        Self {
            rows: problem.rows as u32,
            inputs: problem.inputs as u32,
            outputs: problem.outputs as u32,
            groups,
            x: layout(Operand::X),
            w: layout(Operand::W),
            bias: layout(Operand::Bias),
            y: layout(Operand::Y),
            ..Self::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::params::twin;

    #[test]
    fn wgsl_twin_has_the_same_members_in_the_same_places() {
        let p: LinearParams = twin::numbered();
        let mut own: Vec<(String, u32)> = [
            ("rows", p.rows),
            ("inputs", p.inputs),
            ("outputs", p.outputs),
            ("groups", p.groups),
            ("heads_q", p.heads_q),
            ("head_first", p.head_first),
            ("row_first", p.row_first),
        ]
        .map(|(name, at)| (name.to_string(), at))
        .to_vec();
        for (name, l) in [("x", p.x), ("w", p.w), ("bias", p.bias), ("y", p.y)] {
            own.extend(twin::layout(name, l));
        }
        assert_eq!(own, twin::members::<LinearParams>(include_str!("../../shaders/linear_params.wgsl")));
    }
}
