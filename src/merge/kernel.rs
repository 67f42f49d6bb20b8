//! The merging kernel: what is compiled into it, its WGSL, its bindings and its uniform block.

use super::{MOST_PARTIALS, MergeProblem};
use crate::blueprint::Io;
use crate::caps::Caps;
use crate::dtype::Dtype;
use crate::error::Operand;
use crate::params::ParamLayout;
use crate::shader::{load_part, store_part};
use crate::unroll::unroll;

macro_rules! part {
    ($name:literal) => {
        include_str!(concat!("../../shaders/", $name, ".wgsl"))
    };
}
/// Threads of a workgroup.
pub(crate) const LANES: u32 = 64;

/// Everything that is compiled into one merging pipeline.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct MergeStates {
    /// Pairs of buffers.
    partials: u32,
    /// How the parts' o are read, all of them alike.
    part: Io,
    o: Io,
    lse: bool,
}

/// A storage binding of the kernel; `partial` is the pair that its buffer belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Binding {
    pub(crate) number: u32,
    pub(crate) partial: Option<usize>,
    pub(crate) operand: Operand,
    pub(crate) writes: bool,
}

impl MergeStates {
    pub(crate) fn new(problem: &MergeProblem, caps: &Caps) -> Self {
        let p = problem;
        let whole_quads = p.partials.iter().all(|partials| {
            partials.o.is_vec4(p.head_dim_v) && (partials.parts == 1 || partials.o_step.is_multiple_of(4))
        });
        let io = |dtype, vec4| Io { dtype, vec4, native: dtype == Dtype::F16 && caps.shader_f16 };
        Self {
            partials: p.partials.len() as u32,
            part: io(p.dtype, whole_quads),
            o: io(p.out_dtype, p.o.is_vec4(p.head_dim_v)),
            lse: p.lse,
        }
    }

    pub(crate) fn name(&self) -> &'static str {
        "merge_states"
    }

    /// The bindings but the uniform block, in order of their numbers.
    pub(crate) fn storage(&self) -> Vec<Binding> {
        let pairs = (0..self.partials as usize).map(Some).chain([None]);
        let both = pairs.flat_map(|partial| [(partial, Operand::O), (partial, Operand::Lse)]);
        both.filter(|&pair| pair != (None, Operand::Lse) || self.lse)
            .map(|(partial, operand)| {
                let (number, writes) = (number(partial, operand), partial.is_none());
                Binding { number, partial, operand, writes }
            })
            .collect()
    }

    pub(crate) fn wgsl(&self) -> String {
        let mut out = String::new();
        if self.part.native || self.o.native {
            out.push_str("enable f16;\n");
        }
        out.push_str(&format!("// {}, composed from shaders/\nconst LANES: u32 = {LANES}u;\n", self.name()));
        let mut add = |text: &str| {
            out.push('\n');
            out.push_str(text);
        };
        add(part!("merge_params"));
        add(part!("common"));
        if [self.part, self.o].iter().any(|io| io.dtype != Dtype::F32 && !io.native) {
            add(part!("io/convert"));
        }
        for n in 0..self.partials as usize {
            let named = |text: &str, name: &str, operand| {
                text.replace("OPERAND", &format!("{name}{n}"))
                    .replace("BINDING", &number(Some(n), operand).to_string())
                    .replace("DTYPE", &self.part.dtype.to_string())
                    .replace("WIDTH", "head_dim_v")
                    .replace("NUMBER", &n.to_string())
            };
            add(&named(load_part(self.part), "part", Operand::O));
            if !self.part.vec4 {
                add(&named(part!("io/load4_by_element"), "part", Operand::O));
            }
            add(&named(part!("io/row"), "part", Operand::O));
            add(&named(part!("io/row"), "lse", Operand::Lse));
            add(&named(part!("io/partials"), "lse", Operand::Lse));
        }
        let named = |text: &str, operand: Operand| {
            text.replace("OPERAND", &operand.to_string())
                .replace("BINDING", &number(None, operand).to_string())
                .replace("DTYPE", &self.o.dtype.to_string())
                .replace("WIDTH", "head_dim_v")
        };
        add(&named(&store_part(self.o), Operand::O));
        add(&named(part!("io/row"), Operand::O));
        add(&named(if self.lse { part!("io/lse") } else { part!("io/lse_none") }, Operand::Lse));
        add(&unroll(part!("kernel/merge_states"), &[("PARTIALS", self.partials)]));
        out
    }
}

/// A binding's number, always the same.
fn number(partial: Option<usize>, operand: Operand) -> u32 {
    2 * partial.unwrap_or(MOST_PARTIALS) as u32 + if operand == Operand::Lse { 2 } else { 1 }
}

/// Runtime parameters; see the WGSL twin for what each means.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, bytemuck::Pod, bytemuck::Zeroable)]
pub(crate) struct MergeParams {
    heads_q: u32,
    seq_q: u32,
    head_dim_v: u32,
    rows: u32,
    groups: u32,
    head_first: u32,
    row_first: u32,
    part_count: [u32; MOST_PARTIALS],
    part_step: [u32; MOST_PARTIALS],
    lse_step: [u32; MOST_PARTIALS],
    o: ParamLayout,
    part: [ParamLayout; MOST_PARTIALS],
    lse: [ParamLayout; MOST_PARTIALS],
}

impl MergeParams {
    /// `first` gives the element that the binding of an operand begins with.
    pub(crate) fn new(
        problem: &MergeProblem,
        groups: u32,
        first: impl Fn(Option<usize>, Operand) -> usize,
    ) -> Self {
        let p = problem;
        let mut params = Self {
            heads_q: p.heads_q as u32,
            seq_q: p.seq_q as u32,
            head_dim_v: p.head_dim_v as u32,
            rows: p.rows() as u32,
            groups,
            o: ParamLayout::new(p.o, p.shape(Operand::O), first(None, Operand::O)),
            ..Self::default()
        };
        for (n, of) in p.partials.iter().enumerate() {
            // A step that no part takes may be too wide for a u32.
            let step = |step: usize| if of.parts > 1 { step as u32 } else { 0 };
            params.part_count[n] = of.parts as u32;
            (params.part_step[n], params.lse_step[n]) = (step(of.o_step), step(of.lse_step));
            params.part[n] = ParamLayout::new(of.o, p.shape(Operand::O), first(Some(n), Operand::O));
            params.lse[n] = ParamLayout::new(of.lse, p.shape(Operand::Lse), first(Some(n), Operand::Lse));
        }
        params
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::Layout;
    use crate::merge::Partials;
    use crate::params::twin;
    use crate::pipeline::{Recipe, reflection};

    /// Every kernel that there is: pairs x types x alignments x lse, with and without the shader's own f16.
    fn every_kernel() -> Vec<(MergeStates, bool)> {
        let mut all = Vec::new();
        for shader_f16 in [false, true] {
            let caps = Caps { shader_f16, ..Caps::minimal() };
            for (dtype, out_dtype) in [
                (Dtype::F32, Dtype::F32),
                (Dtype::F16, Dtype::F16),
                (Dtype::Bf16, Dtype::Bf16),
                (Dtype::F32, Dtype::F16),
                (Dtype::Bf16, Dtype::F32),
                (Dtype::F16, Dtype::Bf16),
            ] {
                for (dim, pairs) in [(8, 1), (8, 2), (8, 3), (7, 1), (7, 2), (7, 3)] {
                    let partials = vec![Partials::stacked(2, 1, 2, 3, dim); pairs];
                    let problem = MergeProblem::new(partials, 1, 2, 3, dim);
                    let problem = MergeProblem { dtype, out_dtype, lse: pairs != 2, ..problem };
                    problem.validate().unwrap();
                    all.push((MergeStates::new(&problem, &caps), shader_f16));
                }
            }
        }
        all
    }

    #[test]
    fn every_kernel_is_valid_wgsl_with_the_bindings_that_it_says() {
        for (kernel, shader_f16) in every_kernel() {
            reflection::check(Recipe::MergeStates(kernel), shader_f16);
        }
    }

    #[test]
    fn quads_are_read_as_such_only_where_every_part_begins_at_one() {
        let quads = |partials: Partials| {
            let problem = MergeProblem::new(vec![Partials::stacked(1, 1, 1, 2, 8), partials], 1, 1, 2, 8);
            MergeStates::new(&problem, &Caps::minimal()).part.vec4
        };
        let stacked = Partials::stacked(2, 1, 1, 2, 8);
        assert!(quads(stacked));
        assert!(!quads(Partials { o_step: 17, ..stacked }));
        assert!(!quads(Partials { o: Layout::bhsd(1, 2, 8).at(2), ..stacked }));
        // A step that no part takes may be any.
        assert!(quads(Partials { o_step: 17, parts: 1, ..stacked }));
    }

    #[test]
    fn wgsl_twin_has_the_same_members_in_the_same_places() {
        let p: MergeParams = twin::numbered();
        let mut own: Vec<(String, u32)> = [
            ("heads_q", p.heads_q),
            ("seq_q", p.seq_q),
            ("head_dim_v", p.head_dim_v),
            ("rows", p.rows),
            ("groups", p.groups),
            ("head_first", p.head_first),
            ("row_first", p.row_first),
        ]
        .map(|(name, at)| (name.to_string(), at))
        .to_vec();
        own.extend(twin::layout("o", p.o));
        for n in 0..MOST_PARTIALS {
            own.push((format!("part{n}_count"), p.part_count[n]));
            own.push((format!("part{n}_step"), p.part_step[n]));
            own.push((format!("lse{n}_step"), p.lse_step[n]));
            own.extend(twin::layout(&format!("part{n}"), p.part[n]));
            own.extend(twin::layout(&format!("lse{n}"), p.lse[n]));
        }
        own.sort_by_key(|(_, at)| *at);
        assert_eq!(own, twin::members::<MergeParams>(part!("merge_params")));
    }
}
