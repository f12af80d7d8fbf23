//! From the embeddings of tokens to one of the text.

use serde::Deserialize;

use crate::engine::{Data, Tensor};
use crate::server::companions::Companions;

/// How the embeddings of a text's tokens become one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, strum::Display, strum::EnumIter, strum::EnumString)]
#[serde(rename_all = "lowercase")]
#[strum(serialize_all = "lowercase")]
pub(in crate::server) enum Pooling {
    /// They stay as they are.
    #[default]
    None,
    /// Their mean.
    Mean,
    /// That of the first token, which is `[CLS]` in models of the family of BERT.
    Cls,
    /// The largest value of each dimension.
    Max,
    /// That of the last token, as models have it that read from left to right.
    Last,
}

/// What is done to the embeddings of tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(in crate::server) struct Embedding {
    pub(in crate::server) pooling: Pooling,
    /// Whether each embedding is divided by its Euclidean length.
    pub(in crate::server) normalize: bool,
}

impl Embedding {
    /// As the files of sentence-transformers have it: `modules.json`, whose modules run one after another, and the configuration of its
    /// pooling. Without them nothing is done.
    ///
    /// # Errors
    /// In words that begin with the file's path, where they ask for what is not done here.
    pub(super) fn read(companions: &Companions) -> Result<Self, String> {
        #[derive(Deserialize)]
        struct Module {
            r#type: String,
            #[serde(default)]
            path: String,
        }
        let configuration = companions.json::<Configuration>(CONFIGURATION)?;
        let pooling = configuration.map(|configuration| configuration.pooling()).transpose()?;
        let Some(modules) = companions.json::<Vec<Module>>("modules.json")? else {
            return Ok(Self {
                pooling: pooling.unwrap_or_default(),
                normalize: false,
            });
        };
        let mut embedding = Self::default();
        for module in modules {
            match module.r#type.rsplit('.').next().unwrap_or_default() {
                "Transformer" => {}
                "Pooling" => {
                    let missing = || {
                        format!(
                            "modules.json: the configuration of its pooling, {}/config.json, is missing",
                            module.path
                        )
                    };
                    embedding.pooling = pooling.ok_or_else(missing)?;
                }
                "Normalize" => embedding.normalize = true,
                other => return Err(format!("modules.json: a module {other} is not supported")),
            }
        }
        Ok(embedding)
    }
}

/// Path of the configuration of pooling.
const CONFIGURATION: &str = "1_Pooling/config.json";

/// The configuration of sentence-transformers' `Pooling`: by a name, or by one flag for each way.
#[derive(Deserialize)]
#[serde(default)]
struct Configuration {
    pooling_mode: Option<String>,
    pooling_mode_cls_token: bool,
    pooling_mode_mean_tokens: bool,
    pooling_mode_max_tokens: bool,
    pooling_mode_lasttoken: bool,
    pooling_mode_mean_sqrt_len_tokens: bool,
    pooling_mode_weightedmean_tokens: bool,
}

impl Default for Configuration {
    fn default() -> Self {
        Self {
            pooling_mode: None,
            pooling_mode_cls_token: false,
            // What sentence-transformers takes where nothing is said.
            pooling_mode_mean_tokens: true,
            pooling_mode_max_tokens: false,
            pooling_mode_lasttoken: false,
            pooling_mode_mean_sqrt_len_tokens: false,
            pooling_mode_weightedmean_tokens: false,
        }
    }
}

impl Configuration {
    fn pooling(&self) -> Result<Pooling, String> {
        let ways = [
            ("mean", self.pooling_mode_mean_tokens),
            ("cls", self.pooling_mode_cls_token),
            ("max", self.pooling_mode_max_tokens),
            ("lasttoken", self.pooling_mode_lasttoken),
            ("mean_sqrt_len_tokens", self.pooling_mode_mean_sqrt_len_tokens),
            ("weightedmean", self.pooling_mode_weightedmean_tokens),
        ];
        let flagged = || {
            ways.iter()
                .filter(|(_, asked)| *asked)
                .map(|(way, _)| *way)
                .collect::<Vec<_>>()
                .join("+")
        };
        let way = self.pooling_mode.clone().unwrap_or_else(flagged);
        match &*way {
            "mean" => Ok(Pooling::Mean),
            "cls" => Ok(Pooling::Cls),
            "max" => Ok(Pooling::Max),
            "lasttoken" => Ok(Pooling::Last),
            _ => Err(format!("{CONFIGURATION}: pooling by `{way}` is not supported")),
        }
    }
}

/// Which tokens of each text are its own rather than padding.
#[derive(Debug, Clone, PartialEq)]
pub(in crate::server) struct Mask {
    /// Tokens of a text, padding included.
    length: usize,
    /// By text and token.
    present: Vec<bool>,
}

impl Mask {
    pub(super) fn new(length: usize, present: Vec<bool>) -> Self {
        Self { length, present }
    }

    /// Of the model's own input `attention_mask`, shape `[texts, tokens]`.
    pub(in crate::server) fn of_tensor(tensor: &Tensor) -> Option<Self> {
        let &[_, length] = tensor.shape() else { return None };
        let present = match tensor.data() {
            Data::Int64(values) => values.iter().map(|&value| value != 0).collect(),
            Data::Int32(values) => values.iter().map(|&value| value != 0).collect(),
            Data::Bool(values) => values.clone(),
            other => other.to_f64()?.into_iter().map(|value| value != 0.0).collect(),
        };
        Some(Self { length, present })
    }

    /// Tokens that are no padding.
    pub(in crate::server) fn tokens(&self) -> usize {
        self.present.iter().filter(|&&present| present).count()
    }
}

/// Pools embeddings of shape `[texts, tokens, width]` into `[texts, width]`. Without a mask every token counts; a text of no tokens is all
/// zeros.
///
/// # Errors
/// In words, where the shapes do not fit or the values are not floats.
pub(in crate::server) fn pool(embeddings: &Tensor, mask: Option<&Mask>, pooling: Pooling) -> Result<Tensor, String> {
    let &[texts, length, width] = embeddings.shape() else {
        return Err(format!("shape {:?} holds no embeddings of tokens", embeddings.shape()));
    };
    if let Some(mask) = mask.filter(|mask| mask.length != length || mask.present.len() != texts * length) {
        let given = (mask.present.len() / mask.length.max(1), mask.length);
        return Err(format!(
            "{texts} texts of {length} tokens do not fit a mask of {} by {}",
            given.0, given.1
        ));
    }
    let converted;
    let values = match embeddings.data() {
        Data::Fp32(values) => values,
        Data::Fp16(values) => {
            converted = values.iter().map(|value| value.to_f32()).collect();
            &converted
        }
        other => return Err(format!("{} cannot be pooled", other.datatype())),
    };
    let mut pooled = vec![0.0_f32; texts * width];
    for (text, of_text) in pooled.chunks_mut(width.max(1)).enumerate() {
        let is_present = |token: &usize| mask.is_none_or(|mask| mask.present[text * length + token]);
        let token = |token: usize| &values[(text * length + token) * width..][..width];
        let mut present = (0..length).filter(is_present);
        match pooling {
            Pooling::None => return Ok(embeddings.clone()),
            Pooling::Cls => present.next().into_iter().for_each(|first| of_text.copy_from_slice(token(first))),
            Pooling::Last => present
                .next_back()
                .into_iter()
                .for_each(|last| of_text.copy_from_slice(token(last))),
            Pooling::Max => {
                present.next().into_iter().for_each(|first| of_text.copy_from_slice(token(first)));
                for next in present {
                    of_text
                        .iter_mut()
                        .zip(token(next))
                        .for_each(|(largest, value)| *largest = largest.max(*value));
                }
            }
            Pooling::Mean => {
                let mut count = 0.0_f32;
                for next in present {
                    of_text.iter_mut().zip(token(next)).for_each(|(sum, value)| *sum += value);
                    count += 1.0;
                }
                of_text.iter_mut().for_each(|sum| *sum /= count.max(1.0));
            }
        }
    }
    Tensor::new(vec![texts, width], pooled).map_err(|error| error.to_string())
}

/// Divides what lies along the last dimension by its Euclidean length, or by 1e-12 where it is shorter than that, as PyTorch's
/// `functional.normalize` does.
///
/// # Errors
/// In words, where the values are not single-precision floats.
pub(in crate::server) fn normalize(tensor: Tensor) -> Result<Tensor, String> {
    let shape = tensor.shape().to_vec();
    let width = shape.last().copied().unwrap_or_default();
    let mut values = match tensor.into_data() {
        Data::Fp32(values) => values,
        Data::Fp16(values) => values.into_iter().map(|value| value.to_f32()).collect(),
        other => return Err(format!("{} cannot be normalised", other.datatype())),
    };
    for row in values.chunks_mut(width.max(1)) {
        let length = row.iter().map(|&value| f64::from(value).powi(2)).sum::<f64>().sqrt().max(1e-12) as f32;
        row.iter_mut().for_each(|value| *value /= length);
    }
    Tensor::new(shape, values).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    const MINILM_MODULES: &str = r#"[
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
        {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"}]"#;
    const MINILM_POOLING: &str = r#"{"word_embedding_dimension": 384, "pooling_mode_cls_token": false, "pooling_mode_mean_tokens": true,
        "pooling_mode_max_tokens": false, "pooling_mode_mean_sqrt_len_tokens": false}"#;

    #[test]
    fn sentence_transformers_files_are_read_and_what_is_not_done_is_named() {
        let read = |files: Companions| Embedding::read(&files);
        assert_eq!(read(Companions::default()), Ok(Embedding::default()));
        let minilm = [("modules.json", MINILM_MODULES), (CONFIGURATION, MINILM_POOLING)];
        let expected = Embedding {
            pooling: Pooling::Mean,
            normalize: true,
        };
        assert_eq!(read(minilm.into()), Ok(expected));
        let cls = r#"{"pooling_mode_cls_token": true, "pooling_mode_mean_tokens": false}"#;
        assert_eq!(read([(CONFIGURATION, cls)].into()).unwrap().pooling, Pooling::Cls);
        let last = r#"{"pooling_mode": "lasttoken"}"#;
        assert_eq!(read([(CONFIGURATION, last)].into()).unwrap().pooling, Pooling::Last);

        let both = r#"{"pooling_mode_cls_token": true, "pooling_mode_mean_tokens": true}"#;
        let refused = "1_Pooling/config.json: pooling by `mean+cls` is not supported";
        assert_eq!(read([(CONFIGURATION, both)].into()).unwrap_err(), refused);
        let dense = r#"[{"type": "sentence_transformers.models.Dense", "path": "2_Dense"}]"#;
        assert_eq!(
            read([("modules.json", dense)].into()).unwrap_err(),
            "modules.json: a module Dense is not supported"
        );
        let refused = "modules.json: the configuration of its pooling, 1_Pooling/config.json, is missing";
        assert_eq!(read([("modules.json", MINILM_MODULES)].into()).unwrap_err(), refused);
    }

    fn pooled(mask: &[bool], pooling: Pooling) -> Vec<f32> {
        // Two texts of three tokens in two dimensions.
        let values: Vec<f32> = vec![1.0, 2.0, 3.0, -4.0, 100.0, 200.0, 9.0, 8.0, 7.0, 6.0, 5.0, 4.0];
        let embeddings = Tensor::new(vec![2, 3, 2], values).unwrap();
        let pooled = pool(&embeddings, Some(&Mask::new(3, mask.to_vec())), pooling).unwrap();
        assert_eq!(pooled.shape(), [2, 2]);
        pooled.as_f32().unwrap().to_vec()
    }

    #[test]
    fn padding_never_counts_whichever_side_it_is_on() {
        let mask = [true, true, false, false, true, true];
        assert_eq!(pooled(&mask, Pooling::Mean), [2.0, -1.0, 6.0, 5.0]);
        assert_eq!(pooled(&mask, Pooling::Cls), [1.0, 2.0, 7.0, 6.0]);
        assert_eq!(pooled(&mask, Pooling::Max), [3.0, 2.0, 7.0, 6.0]);
        assert_eq!(pooled(&mask, Pooling::Last), [3.0, -4.0, 5.0, 4.0]);
        assert_eq!(pooled(&[false; 6], Pooling::Mean), [0.0; 4]);
    }

    #[test]
    fn a_mask_of_another_shape_is_refused() {
        let embeddings = Tensor::new(vec![1, 2, 1], vec![1.0_f32, 2.0]).unwrap();
        let text = pool(&embeddings, Some(&Mask::new(3, vec![true; 3])), Pooling::Mean).unwrap_err();
        assert_eq!(text, "1 texts of 2 tokens do not fit a mask of 1 by 3");
    }

    #[test]
    fn normalised_rows_have_the_length_one_and_zeros_stay() {
        let tensor = normalize(Tensor::new(vec![2, 2], vec![3.0_f32, -4.0, 0.0, 0.0]).unwrap()).unwrap();
        assert_eq!(tensor.as_f32().unwrap(), [0.6, -0.8, 0.0, 0.0]);
    }
}
