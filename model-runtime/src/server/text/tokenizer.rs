//! From texts to the model's tensors of tokens, by a `tokenizer.json` of Hugging Face.

use plimsoll_package::manifest::{Datatype, TensorSpec};
use serde::Deserialize;
use tokenizers::{PaddingDirection, TruncationParams};

use super::pooling::Mask;
use crate::engine::{Data, Tensor};
use crate::server::companions::Companions;

/// Most bytes of one text; a model takes a few thousand tokens of it at most.
const TEXT_BYTES_MAX: usize = 1 << 20;

/// Most tokens of a text where nothing says what the model takes.
const TOKENS_MAX: usize = 512;

/// Families of models whose first positions are taken by padding, so that fewer tokens fit than there are positions.
const OFFSET_POSITIONS: [&str; 4] = ["camembert", "roberta", "xlm-roberta", "mpnet"];

/// The inputs that a tokenizer fills, by the names that exporters give them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Role {
    Ids,
    Mask,
    Types,
}

impl Role {
    fn of(name: &str) -> Option<Self> {
        match name {
            "input_ids" => Some(Self::Ids),
            "attention_mask" => Some(Self::Mask),
            "token_type_ids" => Some(Self::Types),
            _ => None,
        }
    }
}

/// The tokens of a text, or of a pair of texts.
#[derive(Debug, Clone, PartialEq)]
pub(in crate::server) struct Tokens {
    ids: Vec<u32>,
    /// To which of the texts each belongs.
    types: Vec<u32>,
}

impl Tokens {
    /// How many there are.
    pub(in crate::server) fn count(&self) -> usize {
        self.ids.len()
    }
}

/// The tokens of texts that run together.
#[derive(Debug)]
pub(in crate::server) struct Batch {
    /// By the names of the model's inputs.
    pub(in crate::server) inputs: Vec<(String, Tensor)>,
    pub(in crate::server) mask: Mask,
}

/// A tokenizer, and the form in which the model takes what it gives.
pub(in crate::server) struct Tokenizer {
    /// Cuts texts off at `tokens_max`.
    tokenizer: tokenizers::Tokenizer,
    /// The model's inputs that it fills.
    inputs: Vec<(TensorSpec, Role)>,
    /// Most tokens of a text.
    tokens_max: usize,
    padding: Padding,
}

/// How texts are made as long as the longest.
struct Padding {
    id: u32,
    type_id: u32,
    direction: PaddingDirection,
    /// To a multiple of so many tokens, 1 or more.
    multiple: usize,
    /// To this length whatever the texts, where the model takes no other.
    length: Option<usize>,
}

impl Tokenizer {
    /// Reads the tokenizer for a model with these `inputs`; `None` where there is none.
    ///
    /// # Errors
    /// In words, where it is broken or does not fit the model.
    pub(in crate::server) fn read(companions: &Companions, inputs: &[TensorSpec]) -> Result<Option<Self>, String> {
        let Some(json) = companions.get("tokenizer.json") else {
            return Ok(None);
        };
        let broken = |error: tokenizers::Error| format!("tokenizer.json: {error}");
        let mut tokenizer = tokenizers::Tokenizer::from_bytes(json).map_err(broken)?;
        let inputs: Vec<(TensorSpec, Role)> = inputs
            .iter()
            .filter_map(|spec| Some((spec.clone(), Role::of(&spec.name)?)))
            .collect();
        let ids = inputs.iter().find(|(_, role)| *role == Role::Ids);
        let (ids, _) = ids.ok_or("tokenizer.json: the model has no input `input_ids` for its tokens")?;
        let fits = |spec: &TensorSpec| spec.shape.len() == 2 && matches!(spec.datatype, Datatype::Int64 | Datatype::Int32);
        if let Some((spec, _)) = inputs.iter().find(|(spec, _)| !fits(spec)) {
            return Err(format!(
                "tokenizer.json: input `{}` takes {} of shape {:?}, tokens are INT64 or INT32 of shape [texts, tokens]",
                spec.name, spec.datatype, spec.shape
            ));
        }
        let length = usize::try_from(ids.shape[1]).ok();
        let given = tokenizer.get_truncation().cloned().unwrap_or_default();
        let stated = stated_tokens_max(companions)?.or_else(|| tokenizer.get_truncation().map(|given| given.max_length));
        let tokens_max = stated.unwrap_or(TOKENS_MAX).min(length.unwrap_or(usize::MAX));
        let truncation = TruncationParams {
            max_length: tokens_max,
            stride: 0,
            direction: given.direction,
            strategy: given.strategy,
        };
        tokenizer.with_truncation(Some(truncation)).map_err(broken)?;
        let padding = tokenizer.get_padding().cloned();
        let token = padding
            .as_ref()
            .map_or_else(|| padding_token(companions), |padding| Ok(Some(padding.pad_token.clone())))?;
        let padding = Padding {
            id: match &padding {
                Some(padding) => padding.pad_id,
                // Whatever stands there is masked.
                None => token.and_then(|token| tokenizer.token_to_id(&token)).unwrap_or(0),
            },
            type_id: padding.as_ref().map_or(0, |padding| padding.pad_type_id),
            direction: padding.as_ref().map_or(PaddingDirection::Right, |padding| padding.direction),
            multiple: padding.and_then(|padding| padding.pad_to_multiple_of).unwrap_or(1).max(1),
            length,
        };
        tokenizer.with_padding(None);
        Ok(Some(Self {
            tokenizer,
            inputs,
            tokens_max,
            padding,
        }))
    }

    /// Whether texts of several lengths can run together: the model is told which tokens are padding, or always gets some.
    pub(in crate::server) fn pads(&self) -> bool {
        self.padding.length.is_some() || self.inputs.iter().any(|(_, role)| *role == Role::Mask)
    }

    /// Whether that input of the model's is filled.
    pub(in crate::server) fn fills(&self, input: &str) -> bool {
        self.inputs.iter().any(|(spec, _)| spec.name == input)
    }

    /// The tokens of a text, or of a pair, with those that the model wants around them.
    ///
    /// # Errors
    /// In words, where it is larger than any text should be, or has more tokens than the model takes and may not be cut off.
    pub(in crate::server) fn tokenize(&self, text: &str, pair: Option<&str>, truncate: bool) -> Result<Tokens, String> {
        let bytes = text.len() + pair.map_or(0, str::len);
        if bytes > TEXT_BYTES_MAX {
            return Err(format!("it has {bytes} bytes, the most are {TEXT_BYTES_MAX}"));
        }
        let encoded = match pair {
            None => self.tokenizer.encode(text, true),
            Some(pair) => self.tokenizer.encode((text, pair), true),
        };
        let encoding = encoded.map_err(|error| format!("it cannot be tokenised: {error}"))?;
        if !truncate && !encoding.get_overflowing().is_empty() {
            return Err(self.too_long());
        }
        Ok(Tokens {
            ids: encoding.get_ids().to_vec(),
            types: encoding.get_type_ids().to_vec(),
        })
    }

    /// Tokens that the client has made itself.
    ///
    /// # Errors
    /// In words, where there are too many of them, or one is not the tokenizer's.
    pub(in crate::server) fn take(&self, ids: Vec<u32>) -> Result<Tokens, String> {
        if ids.len() > self.tokens_max {
            return Err(self.too_long());
        }
        match ids.iter().find(|&&id| self.tokenizer.id_to_token(id).is_none()) {
            Some(id) => Err(format!("the model has no token {id}")),
            None => Ok(Tokens {
                types: vec![0; ids.len()],
                ids,
            }),
        }
    }

    fn too_long(&self) -> String {
        format!("it has more than the {} tokens that the model takes", self.tokens_max)
    }

    /// The length to which texts are padded of which the longest has `tokens`.
    pub(in crate::server) fn padded(&self, tokens: usize) -> usize {
        let multiple = tokens.next_multiple_of(self.padding.multiple);
        // A model may be exported for no tokens at all; no text has none.
        self.padding
            .length
            .unwrap_or(if multiple <= self.tokens_max { multiple } else { tokens })
    }

    /// The tensors of several texts, padded to one length.
    pub(in crate::server) fn batch(&self, texts: &[&Tokens]) -> Batch {
        let longest = texts.iter().map(|text| text.ids.len()).max().unwrap_or_default();
        let length = self.padded(longest);
        let row = |values: &[u32], filling: u32| -> Vec<i64> {
            let own = values.iter().map(|&value| i64::from(value));
            let padding = std::iter::repeat_n(i64::from(filling), length.saturating_sub(values.len()));
            match self.padding.direction {
                PaddingDirection::Right => own.chain(padding).collect(),
                PaddingDirection::Left => padding.chain(own).collect(),
            }
        };
        let present: Vec<i64> = texts.iter().flat_map(|text| row(&vec![1; text.ids.len()], 0)).collect();
        let inputs = self.inputs.iter().map(|(spec, role)| {
            let values: Vec<i64> = match role {
                Role::Ids => texts.iter().flat_map(|text| row(&text.ids, self.padding.id)).collect(),
                Role::Types => texts.iter().flat_map(|text| row(&text.types, self.padding.type_id)).collect(),
                Role::Mask => present.clone(),
            };
            let data = match spec.datatype {
                Datatype::Int32 => Data::Int32(values.into_iter().map(|value| value as i32).collect()),
                _ => Data::Int64(values),
            };
            let tensor = Tensor::new(vec![texts.len(), length], data).expect("every row has the length");
            (spec.name.clone(), tensor)
        });
        Batch {
            inputs: inputs.collect(),
            mask: Mask::new(length, present.iter().map(|&present| present != 0).collect()),
        }
    }
}

/// Most tokens of a text as the model's files state it: sentence-transformers' own bound before the model's.
fn stated_tokens_max(companions: &Companions) -> Result<Option<usize>, String> {
    #[derive(Deserialize)]
    struct SentenceBert {
        max_seq_length: Option<usize>,
    }
    #[derive(Deserialize)]
    struct OfTokenizer {
        /// 1e30 where it is not known.
        model_max_length: Option<f64>,
    }
    #[derive(Deserialize)]
    struct Model {
        #[serde(default)]
        model_type: String,
        max_position_embeddings: Option<usize>,
        pad_token_id: Option<usize>,
    }
    let sentence = companions.json::<SentenceBert>("sentence_bert_config.json")?;
    if let Some(max) = sentence.and_then(|sentence| sentence.max_seq_length) {
        return Ok(Some(max));
    }
    let of_tokenizer = companions
        .json::<OfTokenizer>("tokenizer_config.json")?
        .and_then(|tokenizer| tokenizer.model_max_length)
        .filter(|&max| (1.0..1e9).contains(&max))
        .map(|max| max as usize);
    let of_model = companions.json::<Model>("config.json")?.and_then(|model| {
        let positions = model.max_position_embeddings?;
        let taken = if OFFSET_POSITIONS.contains(&&*model.model_type) {
            model.pad_token_id? + 1
        } else {
            0
        };
        positions.checked_sub(taken).filter(|&positions| positions > 0)
    });
    Ok(of_tokenizer.into_iter().chain(of_model).min())
}

/// The token that fills texts up, where the tokenizer itself does not say.
fn padding_token(companions: &Companions) -> Result<Option<String>, String> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Token {
        Plain(String),
        Added { content: String },
    }
    #[derive(Deserialize)]
    struct OfTokenizer {
        pad_token: Option<Token>,
    }
    let token = companions
        .json::<OfTokenizer>("tokenizer_config.json")?
        .and_then(|tokenizer| tokenizer.pad_token);
    Ok(token.map(|token| match token {
        Token::Plain(content) | Token::Added { content } => content,
    }))
}

#[cfg(test)]
mod tests;
