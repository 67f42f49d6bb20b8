//! The kernels of linear maps: what is compiled into one, its WGSL and its bindings.

use super::sizes::{FAR, Sizes, direct};
use super::{LinearKernel, LinearProblem, OPERANDS};
use crate::blueprint::Io;
use crate::caps::Caps;
use crate::dtype::Dtype;
use crate::error::Operand;
use crate::layout::Layout;
use crate::shader::{cells, load_part, placed, store_part};
use crate::unroll::unroll;

macro_rules! part {
    ($name:literal) => {
        include_str!(concat!("../../shaders/", $name, ".wgsl"))
    };
}

/// Everything that is compiled into one pipeline of a linear map.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Linear {
    sizes: Sizes,
    x: Io,
    w: Io,
    /// W's vectors lie along the outputs, else along the inputs.
    by_outputs: bool,
    bias: Option<Io>,
    y: Io,
    /// The inputs are whole quads.
    whole: bool,
    /// There are so many inputs that sums need a third level.
    far: bool,
}

impl Linear {
    /// What serves a problem, which has been validated.
    pub(crate) fn new(problem: &LinearProblem, caps: &Caps) -> Self {
        Self::of(problem, problem.kernel.unwrap_or_else(|| problem.kernel_on(caps)), caps)
    }

    /// A problem by a kernel, whether it fits the device or not.
    pub(crate) fn of(problem: &LinearProblem, kernel: LinearKernel, caps: &Caps) -> Self {
        let p = problem;
        let io = |dtype, vec4| Io { dtype, vec4, native: dtype == Dtype::F16 && caps.shader_f16 };
        // The other way round than it is described.
        let [.., to_output, to_input] = p.w.strides;
        let transposed = Layout { offset: p.w.offset, strides: [0, 0, to_input, to_output] };
        let by_outputs = to_output == 1 && to_input != 1 && p.outputs > 1;
        let matrix =
            |layout: Layout| Layout { strides: [0, 0, layout.strides[2], layout.strides[3]], ..layout };
        let w_vec4 = if by_outputs { transposed.is_vec4(p.outputs) } else { matrix(p.w).is_vec4(p.inputs) };
        let x = io(p.dtype, matrix(p.x).is_vec4(p.inputs));
        let w = io(p.weight_dtype, w_vec4);
        let rows = p.rows.clamp(1, 1 << 16) as u32;
        let far = p.inputs > FAR as usize;
        Self {
            sizes: Sizes::of(kernel, rows, [x, w], by_outputs, far, caps),
            x,
            w,
            by_outputs,
            // Read once for each element of y: any way will do.
            bias: p.bias.map(|bias| io(bias.dtype, false)),
            y: io(p.out_dtype, matrix(p.y).is_vec4(p.outputs)),
            whole: p.inputs.is_multiple_of(4),
            far,
        }
    }

    /// What multiplies rows that attention reads, as `x` says, by f32 matrices of a head:
    /// `[inputs, outputs]`, or `[outputs, inputs]`.
    pub(crate) fn product(x: Io, [rows, inputs, outputs]: [usize; 3], by_outputs: bool, caps: &Caps) -> Self {
        let p = LinearProblem { dtype: x.dtype, ..LinearProblem::new(rows.max(1), inputs, outputs) };
        let all = Self::new(&if by_outputs { p.with_transposed_weights() } else { p }, caps);
        let sizes = match all.sizes {
            Sizes::Direct { .. } => direct(p.rows.min(1 << 16) as u32, x, all.w, all.by_outputs),
            sizes => sizes,
        };
        Self { sizes, x, ..all }
    }

    pub(crate) fn kernel(&self) -> LinearKernel {
        self.sizes.kernel()
    }

    pub(crate) fn name(&self) -> &'static str {
        self.kernel().name()
    }

    /// Workgroups that own a tile. Fits a u32: y's elements are no more than that, all of them in different
    /// places, and each tile has one.
    pub(crate) fn groups(&self, problem: &LinearProblem) -> u64 {
        self.tiles(problem.rows as u64, problem.outputs as u64)
    }

    /// The same for any matrix of outputs.
    pub(crate) fn tiles(&self, rows: u64, outputs: u64) -> u64 {
        let [tile_rows, quads] = self.sizes.tile().map(u64::from);
        rows.div_ceil(tile_rows) * outputs.div_ceil(4 * quads)
    }

    /// Threads of a workgroup.
    pub(crate) fn threads(&self) -> u32 {
        self.sizes.threads()
    }

    /// Bytes of workgroup memory.
    pub(crate) fn workgroup_bytes(&self) -> u32 {
        self.sizes.workgroup_bytes(self.by_outputs)
    }

    /// Why the device cannot run this; `None` where it can.
    pub(crate) fn unfit(&self, caps: &Caps) -> Option<String> {
        if let Some(why) = self.kernel().lacks(caps) {
            return Some(why);
        }
        let [x, w] = [self.x.dtype, self.w.dtype];
        if matches!(self.sizes, Sizes::Matrix(_)) && [x, w] != [Dtype::F16; 2] {
            return Some(format!("matrix units take f16, not {}", if x == Dtype::F16 { w } else { x }));
        }
        let threads = self.threads();
        let storage = self.storage().len() as u32;
        for (what, need, got) in [
            ("threads a workgroup", threads, caps.max_invocations),
            ("threads along x", threads, caps.max_workgroup_size[0]),
            ("bytes of workgroup memory", self.workgroup_bytes(), caps.max_workgroup_bytes),
            ("storage buffers", storage, caps.max_storage_buffers),
        ] {
            if need > got {
                return Some(format!("it needs {need} {what}, the device has {got}"));
            }
        }
        None
    }

    /// Its operands with their bindings' numbers, in order of those, and whether it writes them.
    pub(crate) fn storage(&self) -> Vec<(u32, Operand, bool)> {
        let all = OPERANDS.into_iter().filter(|&operand| operand != Operand::Bias || self.bias.is_some());
        all.map(|operand| (number(operand), operand, operand == Operand::Y)).collect()
    }

    pub(crate) fn wgsl(&self) -> String {
        let mut out = String::new();
        let ios = [Some(self.x), Some(self.w), self.bias, Some(self.y)];
        if ios.iter().flatten().any(|io| io.native) {
            out.push_str("enable f16;\n");
        }
        if matches!(self.sizes, Sizes::Matrix(_)) {
            out.push_str("enable wgpu_cooperative_matrix;\n");
        }
        out.push_str(&format!("// {}, composed from shaders/\n", self.name()));
        out.push_str(&self.header());
        let mut add = |text: &str| {
            out.push('\n');
            out.push_str(text);
        };
        add(part!("linear_params"));
        add(part!("common"));
        if ios.iter().flatten().any(|io| io.dtype != Dtype::F32 && !io.native) {
            add(part!("io/convert"));
        }
        let named = |text: &str, operand: Operand, io: Io, width: &str| {
            text.replace("OPERAND", &operand.to_string())
                .replace("BINDING", &number(operand).to_string())
                .replace("DTYPE", &io.dtype.to_string())
                .replace("WIDTH", width)
        };
        let by_element = part!("io/load4_by_element");
        add(&named(load_part(self.x), Operand::X, self.x, "inputs"));
        if !self.x.vec4 {
            add(&named(by_element, Operand::X, self.x, "inputs"));
        }
        add(part!("io/linear_x"));
        let along = if self.by_outputs { "outputs" } else { "inputs" };
        add(&named(&self.load_w(), Operand::W, self.w, along));
        match self.bias {
            Some(io) => {
                add(&named(load_part(io), Operand::Bias, io, "outputs"));
                add(part!("io/linear_bias"));
            }
            None => add(part!("io/linear_bias_none")),
        }
        add(&named(&store_part(self.y), Operand::Y, self.y, "outputs"));
        add(part!("io/linear_end"));
        add(part!("io/linear_band"));
        add(&self.kernel_text());
        out
    }

    /// The WGSL of a product but its rows and where it goes (shaders/io/product*.wgsl), of parameters that
    /// are the widths of x and of the output.
    pub(crate) fn product_wgsl(&self, w: u32, [inputs, outputs]: [&str; 2]) -> String {
        let [inputs, outputs] = [inputs, outputs].map(|name| format!("params.{name}"));
        let (along, to_input, to_output) =
            if self.by_outputs { (&outputs, &*outputs, "1u") } else { (&inputs, "1u", &*inputs) };
        let load = self.load_w().replace("OPERAND", "w").replace("BINDING", &w.to_string());
        let text = [load.replace("params.WIDTH", along), self.kernel_text()].join("\n");
        let text = text
            .replace("params.rows", "product_rows()")
            .replace("params.groups", "product_tiles()")
            .replace("params.w_offset", "product_w()")
            .replace("params.w_stride_d", to_input)
            .replace("params.w_stride_s", to_output)
            .replace("params.inputs", &inputs)
            .replace("params.outputs", &outputs);
        [self.header(), text].join("\n")
    }

    /// The compile-time sizes.
    fn header(&self) -> String {
        let mut out = String::new();
        for (name, value) in self.constants() {
            out.push_str(&format!("const {name}: u32 = {value}u;\n"));
        }
        out.push_str(&format!("const BY_OUTPUTS: bool = {};\n", self.by_outputs));
        out.push_str(&format!("const WHOLE: bool = {};\n", self.whole));
        out
    }

    /// How W is read, as it lies.
    fn load_w(&self) -> String {
        let mut out = load_part(self.w).to_string();
        let by_element = part!("io/load4_by_element");
        if !self.w.vec4 && self.by_outputs {
            out.push_str(&by_element.replace("stride_d", "stride_s"));
        } else if !self.w.vec4 {
            out.push_str(by_element);
        }
        out.push_str(if self.by_outputs {
            part!("io/linear_w_by_outputs")
        } else {
            part!("io/linear_w_by_inputs")
        });
        out
    }

    /// The kernel, between what it reads and what it writes.
    fn kernel_text(&self) -> String {
        let mut out = String::new();
        let mut add = |text: &str| {
            out.push('\n');
            out.push_str(text);
        };
        let text = match self.sizes {
            Sizes::Tile { .. } => {
                let by_outputs = self.by_outputs;
                add(part!("exchange/pairs"));
                add(if by_outputs {
                    part!("io/linear_stage_by_outputs")
                } else {
                    part!("io/linear_stage_by_inputs")
                });
                part!("kernel/linear_tile")
            }
            Sizes::Few { share, .. } => {
                let (place, exchange) = match share {
                    None => (part!("exchange/place_workgroup"), part!("io/linear_share_none")),
                    Some(_) => (part!("exchange/place_subgroup"), part!("io/linear_share_subgroup")),
                };
                add(place);
                add(exchange);
                add(&unroll(&placed(part!("kernel/linear_few"), share.is_some()), &self.constants()));
                return out;
            }
            Sizes::Matrix(matrix) => {
                add(part!("exchange/place_subgroup"));
                let (stage, load) = if self.by_outputs {
                    (part!("io/linear_matrix_by_outputs"), "coopLoadT")
                } else {
                    (part!("io/linear_matrix_by_inputs"), "coopLoad")
                };
                add(stage);
                for name in ["x", "w"] {
                    add(&cells(matrix.scalars, name, "f16"));
                }
                let fragment = format!("coop_mat{0}x{0}", matrix.edge);
                let text = placed(part!("kernel/linear_matrix"), true).replace("FRAGMENT", &fragment);
                add(&unroll(&text.replace("LOAD_W", load), &self.constants()));
                return out;
            }
            Sizes::Direct { .. } => part!("kernel/linear_direct"),
        };
        add(&unroll(text, &self.constants()));
        out
    }

    fn constants(&self) -> Vec<(&'static str, u32)> {
        self.sizes.constants(self.by_outputs, self.far)
    }
}

/// A binding's number, always the same.
fn number(operand: Operand) -> u32 {
    match operand {
        Operand::X => 1,
        Operand::W => 2,
        Operand::Bias => 3,
        _ => 4,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::caps::MatrixUnits;
    use crate::pipeline::{Recipe, reflection};

    /// Every kernel that there is: families x types x alignments x orders of W x bias, with and without the
    /// shader's own f16.
    fn every_kernel() -> Vec<(Linear, Caps)> {
        let mut all = Vec::new();
        for shader_f16 in [false, true] {
            let caps = Caps {
                shader_f16,
                subgroup: Some((32, 32)),
                matrix: Some(MatrixUnits { edge: 16, subgroup: 32, scalars: false, tested: None }),
                ..Caps::minimal()
            };
            for &kernel in LinearKernel::ALL {
                for (dtype, weight_dtype, out_dtype) in [
                    (Dtype::F32, Dtype::F32, Dtype::F32),
                    (Dtype::F16, Dtype::F16, Dtype::F16),
                    (Dtype::Bf16, Dtype::Bf16, Dtype::Bf16),
                    (Dtype::F32, Dtype::F16, Dtype::Bf16),
                    (Dtype::Bf16, Dtype::F32, Dtype::F16),
                    (Dtype::F16, Dtype::Bf16, Dtype::F32),
                    (Dtype::F16, Dtype::F16, Dtype::F32),
                ] {
                    if kernel == LinearKernel::Matrix
                        && (!shader_f16 || [dtype, weight_dtype] != [Dtype::F16; 2])
                    {
                        continue;
                    }
                    for (rows, inputs, outputs) in [(1, 8, 8), (6, 8, 7), (40, 7, 8), (100, 64, 36)] {
                        let p = LinearProblem::new(rows, inputs, outputs);
                        let p = LinearProblem { dtype, weight_dtype, out_dtype, kernel: Some(kernel), ..p };
                        for p in [p, p.with_transposed_weights().with_bias(weight_dtype)] {
                            p.validate().unwrap();
                            let linear = Linear::new(&p, &caps);
                            assert_eq!((linear.kernel(), linear.unfit(&caps)), (kernel, None));
                            assert_eq!(linear.name(), kernel.to_string());
                            all.push((linear, caps.clone()));
                        }
                    }
                }
            }
        }
        all
    }

    #[test]
    fn every_kernel_is_valid_wgsl_with_the_bindings_that_it_says() {
        for (kernel, caps) in every_kernel() {
            let bytes = reflection::check(Recipe::Linear(kernel), caps.shader_f16);
            // What it says of its workgroup memory is what it has.
            let exact = Caps { max_workgroup_bytes: bytes, ..caps };
            assert_eq!(kernel.unfit(&exact), None);
            let less = Caps { max_workgroup_bytes: bytes.saturating_sub(1), ..exact };
            assert_eq!(kernel.unfit(&less).is_some(), bytes > 0, "{kernel:?}");
        }
    }

    #[test]
    fn w_is_read_as_it_lies() {
        let of = |p: LinearProblem| {
            let linear = Linear::new(&p, &Caps::minimal());
            (linear.by_outputs, linear.w.vec4)
        };
        let p = LinearProblem::new(4, 8, 12);
        assert_eq!(of(p), (false, true));
        assert_eq!(of(p.with_transposed_weights()), (true, true));
        assert_eq!(of(LinearProblem { w: p.w.at(2), ..p }), (false, false));
        assert_eq!(of(LinearProblem { outputs: 11, ..p }), (false, true));
        assert_eq!(of(LinearProblem { outputs: 11, ..p }.with_transposed_weights()), (true, false));
        assert_eq!(of(LinearProblem { inputs: 7, ..p }.with_transposed_weights()), (true, true));
        assert_eq!(
            of(LinearProblem { w: Layout { offset: 0, strides: [0, 0, 32, 2] }, ..p }),
            (false, false)
        );
    }
}
