//! Texts: tokenised into what the model takes, and its embeddings of tokens pooled into one of the text.

use plimsoll_package::manifest::{Datatype, TensorSpec};

use super::companions::Companions;
use crate::engine::{Data, Tensor};

mod pooling;
mod tokenizer;

pub(super) use pooling::{Embedding, Mask, Pooling, normalize, pool};
pub(super) use tokenizer::{Batch, Tokenizer, Tokens};

/// The input of texts.
pub(super) const TEXT: &str = "text";
/// The input of what each text is paired with.
pub(super) const TEXT_PAIR: &str = "text_pair";
/// The output of one embedding for each text.
pub(super) const SENTENCE_EMBEDDING: &str = "sentence_embedding";

/// Names of outputs that hold the embeddings of tokens, as exporters give them.
const TOKEN_EMBEDDINGS: [&str; 2] = ["last_hidden_state", "token_embeddings"];
/// Names of outputs of three dimensions that hold none.
const NO_EMBEDDINGS: [&str; 1] = ["logits"];

/// Where a model's embeddings are among its outputs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Embeddings {
    /// Of each token, shape `[texts, tokens, width]`.
    OfTokens(usize),
    /// Of each text, shape `[texts, width]`.
    OfTexts(usize),
}

impl Embeddings {
    /// Finds them by name, or as the only output of such a shape.
    pub(super) fn find(outputs: &[TensorSpec]) -> Option<Self> {
        let is_float = |spec: &TensorSpec| matches!(spec.datatype, Datatype::Fp32 | Datatype::Fp16);
        let named = |name: &str, rank| {
            outputs
                .iter()
                .position(|spec| spec.name == name && spec.shape.len() == rank && is_float(spec))
        };
        if let Some(index) = named(SENTENCE_EMBEDDING, 2) {
            return Some(Self::OfTexts(index));
        }
        let by_name = TOKEN_EMBEDDINGS.iter().find_map(|name| named(name, 3));
        let mut others = outputs
            .iter()
            .enumerate()
            .filter(|(_, spec)| spec.shape.len() == 3 && is_float(spec) && !NO_EMBEDDINGS.contains(&&*spec.name));
        let only = match (others.next(), others.next()) {
            (Some((index, _)), None) => Some(index),
            _ => None,
        };
        by_name.or(only).map(Self::OfTokens)
    }
}

/// How a model takes texts.
pub(super) struct Text {
    pub(super) tokenizer: Tokenizer,
    /// What is done to embeddings where the request does not say.
    pub(super) embedding: Embedding,
}

impl Text {
    /// Reads what the model's files say; `None` where they hold no tokenizer.
    ///
    /// # Errors
    /// In words that begin with the file's path.
    pub(super) fn read(companions: &Companions, inputs: &[TensorSpec]) -> Result<Option<Self>, String> {
        let Some(tokenizer) = Tokenizer::read(companions, inputs)? else {
            return Ok(None);
        };
        Ok(Some(Self {
            tokenizer,
            embedding: Embedding::read(companions)?,
        }))
    }

    /// The tensors of the texts in the tensors `text` and `text_pair`, of at most `bytes_max` bytes. A text of more tokens than the model
    /// takes is cut off, or refused unless `truncate`.
    ///
    /// # Errors
    /// In words that name the input and the text.
    pub(super) fn fill(&self, text: &Tensor, pair: Option<&Tensor>, truncate: bool, bytes_max: usize) -> Result<Batch, String> {
        let texts = strings(TEXT, text)?;
        let pairs = pair.map(|pair| strings(TEXT_PAIR, pair)).transpose()?;
        if let Some(pairs) = pairs.as_ref().filter(|pairs| pairs.len() != texts.len()) {
            let (pairs, texts) = (pairs.len(), texts.len());
            return Err(format!("input `{TEXT_PAIR}` has {pairs} texts, input `{TEXT}` has {texts}"));
        }
        let mut tokens: Vec<Tokens> = Vec::with_capacity(texts.len());
        let mut longest = 0;
        for (index, text) in texts.iter().enumerate() {
            let pair = pairs.as_ref().map(|pairs| pairs[index]);
            let tokenized = self.tokenizer.tokenize(text, pair, truncate);
            let tokenized = tokenized.map_err(|reason| format!("input `{TEXT}`: text {index}: {reason}"))?;
            longest = longest.max(tokenized.count());
            tokens.push(tokenized);
            let bytes = self.tokenizer.padded(longest).saturating_mul(texts.len()).saturating_mul(8);
            if bytes > bytes_max {
                return Err(format!(
                    "input `{TEXT}`: {} texts of up to {longest} tokens are more than the {bytes_max} bytes that this server takes; send fewer at a time",
                    texts.len()
                ));
            }
        }
        if !self.tokenizer.pads() && tokens.iter().any(|tokens| tokens.count() != longest) {
            return Err(format!(
                "input `{TEXT}`: the texts have several lengths, and the model has no attention_mask to tell padding by; send them one by one"
            ));
        }
        Ok(self.tokenizer.batch(&tokens.iter().collect::<Vec<_>>()))
    }
}

/// The texts of a tensor of shape `[texts]` or `[texts, 1]`.
fn strings<'a>(name: &str, tensor: &'a Tensor) -> Result<Vec<&'a str>, String> {
    let Data::Bytes(values) = tensor.data() else {
        return Err(format!("input `{name}` takes BYTES, {} was given", tensor.datatype()));
    };
    if values.is_empty() {
        return Err(format!("input `{name}` holds no text"));
    }
    if !matches!(tensor.shape(), [_] | [_, 1]) {
        return Err(format!(
            "input `{name}` takes shape [-1] (a text for each), {:?} was given",
            tensor.shape()
        ));
    }
    let text = |(index, value)| str::from_utf8(value).map_err(|error| format!("input `{name}`: text {index} is not UTF-8: {error}"));
    values.iter().map(Vec::as_slice).enumerate().map(text).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(name: &str, shape: &[i64]) -> TensorSpec {
        TensorSpec {
            name: name.into(),
            datatype: Datatype::Fp32,
            shape: shape.to_vec(),
        }
    }

    #[test]
    fn embeddings_are_found_by_name_or_by_being_the_only_ones() {
        let find = |outputs: &[TensorSpec]| Embeddings::find(outputs);
        let (tokens, pooled) = (spec("last_hidden_state", &[-1, -1, 8]), spec("pooler_output", &[-1, 8]));
        assert_eq!(find(&[pooled.clone(), tokens.clone()]), Some(Embeddings::OfTokens(1)));
        assert_eq!(
            find(&[tokens.clone(), spec(SENTENCE_EMBEDDING, &[-1, 8])]),
            Some(Embeddings::OfTexts(1))
        );
        assert_eq!(find(&[spec("1234", &[-1, -1, 8])]), Some(Embeddings::OfTokens(0)));
        assert_eq!(find(&[spec("hidden.0", &[-1, -1, 8]), spec("hidden.1", &[-1, -1, 8])]), None);
        assert_eq!(find(&[spec("logits", &[-1, -1, 8])]), None);
        assert_eq!(find(&[pooled]), None);
    }

    #[test]
    fn what_holds_no_texts_is_named() {
        let strings = |shape: &[usize], data: Data| strings(TEXT, &Tensor::new(shape.to_vec(), data).unwrap()).map(|texts| texts.len());
        let two = || Data::from(vec![b"a".to_vec(), b"b".to_vec()]);
        assert_eq!(strings(&[2], two()), Ok(2));
        assert_eq!(strings(&[2, 1], two()), Ok(2));
        assert_eq!(
            strings(&[1, 2], two()).unwrap_err(),
            "input `text` takes shape [-1] (a text for each), [1, 2] was given"
        );
        assert_eq!(
            strings(&[1], vec![1.0_f32].into()).unwrap_err(),
            "input `text` takes BYTES, FP32 was given"
        );
        let text = strings(&[1], vec![vec![0xff_u8]].into()).unwrap_err();
        assert!(text.starts_with("input `text`: text 0 is not UTF-8"), "{text}");
    }
}
