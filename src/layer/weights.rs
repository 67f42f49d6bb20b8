//! Weights of layers from checkpoints in the safetensors format.

use safetensors::SafeTensors;
use safetensors::tensor::Dtype as Stored;

use super::{HostWeights, Layer};
use crate::append::QkNorm;
use crate::dtype::{Dtype, Tensor};
use crate::error::{Error, Result};

/// How a checkpoint names the tensors of its layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Naming {
    /// `encoder.layer.N.attention.self.query.weight` and its kin (BERT, MiniLM).
    Bert,
    /// `model.layers.N.self_attn.q_proj.weight` and its kin (Llama, Mistral, Qwen, SmolLM; and Gemma, but for the gains
    /// of its norms: 1 is to be added to those).
    Llama,
}

impl Naming {
    /// The naming that a checkpoint follows, by what it calls the first layer's queries.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] where it follows neither.
    pub fn of(tensors: &SafeTensors<'_>) -> Result<Self> {
        [Self::Bert, Self::Llama]
            .into_iter()
            .find(|naming| naming.find(tensors, 0, "q").is_some())
            .ok_or_else(|| {
                let tensor = Self::Bert.names(0, "q", "weight").remove(0);
                let why = "neither it nor Llama's model.layers.0.self_attn.q_proj.weight is there".into();
                Error::Checkpoint { tensor, why }
            })
    }

    /// What the tensor of a part may be called, with and without the model's own name before it.
    fn names(self, layer: usize, part: &str, kind: &str) -> Vec<String> {
        let (prefixes, name) = match self {
            Self::Bert => {
                let part = match part {
                    "q" => "self.query",
                    "k" => "self.key",
                    "v" => "self.value",
                    "o" => "output.dense",
                    // BERT normalises no queries.
                    other => other,
                };
                (["", "bert."], format!("encoder.layer.{layer}.attention.{part}.{kind}"))
            }
            Self::Llama => {
                let part = if part.ends_with("norm") { part.to_string() } else { format!("{part}_proj") };
                (["model.", ""], format!("layers.{layer}.self_attn.{part}.{kind}"))
            }
        };
        prefixes.iter().map(|prefix| format!("{prefix}{name}")).collect()
    }

    fn find(self, tensors: &SafeTensors<'_>, layer: usize, part: &str) -> Option<String> {
        self.names(layer, part, "weight").into_iter().find(|name| tensors.tensor(name).is_ok())
    }
}

impl HostWeights {
    /// The weights of layer `number` of a checkpoint, converted to [`Layer::weight_dtype`].
    ///
    /// # Errors
    /// [`Error::Checkpoint`], which names the tensor, for one that is not there, that has another shape than the
    /// layer needs, or whose element type is none of f32, f16 and bf16, and for a bias or a norm of q and k that is there
    /// and that the layer does not have; [`Error::Layer`] for a packed or a transposed layer, which these checkpoints
    /// do not have.
    pub fn from_safetensors(
        tensors: &SafeTensors<'_>,
        naming: Naming,
        number: usize,
        layer: &Layer,
    ) -> Result<Self> {
        if layer.packed || layer.transposed {
            let why = "checkpoints have a matrix [out, in] for each of q, k and v".into();
            return Err(Error::Layer { why });
        }
        layer.validate()?;
        let p = &layer.attention;
        let [q, k, v] = layer.widths();
        let width_kv = layer.context_width.unwrap_or(layer.width);
        let read = |part: &str, kind: &str, shape: &[usize]| {
            read(tensors, &naming.names(number, part, kind), shape, layer.weight_dtype)
        };
        let matrix = |part, outputs, inputs| read(part, "weight", &[outputs, inputs]);
        // What a checkpoint has and a layer leaves out would make other numbers, and nothing would say so.
        let unwanted = |part: &str, kind: &str| {
            let names = naming.names(number, part, kind);
            let found = names.into_iter().find(|name| tensors.tensor(name).is_ok());
            let why = "it is there, and the layer has no such part".into();
            found.map_or(Ok(None::<Tensor>), |tensor| Err(Error::Checkpoint { tensor, why }))
        };
        let bias = |part, outputs| {
            let wanted = if part == "o" { layer.bias_o } else { layer.bias };
            if wanted { read(part, "bias", &[outputs]).map(Some) } else { unwanted(part, "bias") }
        };
        // f32 whatever the matrices are, as the layer takes them.
        let gain = |part, dim| match layer.norm {
            Some(QkNorm::Rms { .. }) => {
                let names = naming.names(number, part, "weight");
                Ok::<_, Error>(Some(self::read(tensors, &names, &[dim], Dtype::F32)?.to_f32()))
            }
            _ => unwanted(part, "weight").map(|_| None),
        };
        Ok(Self {
            w_q: matrix("q", q, layer.width)?,
            w_k: Some(matrix("k", k, width_kv)?),
            w_v: Some(matrix("v", v, width_kv)?),
            w_o: matrix("o", layer.out_width, p.heads_q * p.head_dim_v)?,
            b_q: bias("q", q)?,
            b_k: bias("k", k)?,
            b_v: bias("v", v)?,
            b_o: bias("o", layer.out_width)?,
            q_gain: gain("q_norm", p.query_dim())?,
            k_gain: gain("k_norm", p.head_dim)?,
        })
    }
}

/// The first of these tensors that is there, converted.
fn read(tensors: &SafeTensors<'_>, names: &[String], shape: &[usize], dtype: Dtype) -> Result<Tensor> {
    let fail = |tensor: &String, why| Err(Error::Checkpoint { tensor: tensor.clone(), why });
    let Some((name, view)) = names.iter().find_map(|name| Some((name, tensors.tensor(name).ok()?))) else {
        return fail(&names[0], "it is not there".into());
    };
    if view.shape() != shape {
        return fail(name, format!("its shape is {:?}, the layer needs {shape:?}", view.shape()));
    }
    let stored = match view.dtype() {
        Stored::F32 => Dtype::F32,
        Stored::F16 => Dtype::F16,
        Stored::BF16 => Dtype::Bf16,
        other => return fail(name, format!("its element type is {other:?}, not F32, F16 or BF16")),
    };
    let tensor = Tensor::from_bytes(stored, view.data());
    Ok(if stored == dtype { tensor } else { Tensor::from_f32(dtype, &tensor.to_f32()) })
}
