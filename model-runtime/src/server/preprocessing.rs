//! Inputs that a client may give instead of the model's own: texts and encoded images.

use std::sync::Arc;

use plimsoll_package::manifest::{Datatype, TensorSpec};
use tokio::sync::OwnedSemaphorePermit;

use super::State;
use super::companions::Companions;
use super::images::{IMAGE, Images, Refused};
use super::inference::{Options, memory_units};
use super::refusal::{Reason, Refusal};
use super::text::{Embeddings, Mask, Pooling, SENTENCE_EMBEDDING, TEXT, TEXT_PAIR, Text, normalize, pool};
use crate::engine::Tensor;

/// Inputs of at most so many bytes are made into tensors on the thread at hand: a sentence or two.
const INLINE_BYTES_MAX: usize = 1 << 10;

/// What a model takes besides its own inputs, and gives besides its own outputs. What its files ask for and cannot be done is kept in
/// words, for who asks for it.
pub(super) struct Preprocessing {
    text: Result<Option<Text>, String>,
    images: Result<Option<Images>, String>,
    embeddings: Option<Embeddings>,
    /// Names of the model's own inputs, which are the model's alone.
    own: Vec<String>,
    /// What a pooled output looks like, where the model's outputs can be pooled.
    pooled: Option<TensorSpec>,
}

/// The inputs of a request, made into the model's own.
#[derive(Debug, PartialEq)]
pub(super) struct Prepared {
    pub(super) inputs: Vec<(String, Tensor)>,
    /// Which tokens are of the texts, where they came as texts.
    pub(super) mask: Option<Mask>,
}

/// What is done to the embeddings that the model gives.
#[derive(Debug, PartialEq)]
pub(super) struct Postprocessing {
    embeddings: Embeddings,
    pooling: Pooling,
    normalize: bool,
    mask: Option<Mask>,
}

impl Preprocessing {
    /// Reads what the companions of a model with these `inputs` and `outputs` say; what cannot be done is logged, since the model itself
    /// can be served without.
    pub(super) fn read(companions: &Companions, inputs: &[TensorSpec], outputs: &[TensorSpec]) -> Self {
        let mut text = Text::read(companions, inputs);
        let mut images = Images::read(companions, inputs);
        // A model's own input of that name is not taken from it.
        let is_own = |name: &str| inputs.iter().any(|spec| spec.name == name);
        if is_own(TEXT) {
            text = Ok(None);
        }
        if is_own(IMAGE) && !matches!(&images, Ok(Some(images)) if images.input() == IMAGE) {
            images = Ok(None);
        }
        for reason in [text.as_ref().err(), images.as_ref().err()].into_iter().flatten() {
            tracing::warn!(reason, "the model takes its own inputs alone");
        }
        let embeddings = Embeddings::find(outputs);
        let pooled = match embeddings {
            Some(Embeddings::OfTokens(index)) if !outputs.iter().any(|spec| spec.name == SENTENCE_EMBEDDING) => Some(TensorSpec {
                name: SENTENCE_EMBEDDING.into(),
                datatype: Datatype::Fp32,
                shape: vec![outputs[index].shape[0], outputs[index].shape[2]],
            }),
            _ => None,
        };
        Self {
            text,
            images,
            embeddings,
            own: inputs.iter().map(|spec| spec.name.clone()).collect(),
            pooled,
        }
    }

    /// The inputs that may be given instead of the model's own.
    pub(super) fn inputs(&self) -> Vec<TensorSpec> {
        let input = |name: &str| TensorSpec {
            name: name.into(),
            datatype: Datatype::Bytes,
            shape: vec![-1],
        };
        let texts = matches!(self.text, Ok(Some(_))).then(|| [input(TEXT), input(TEXT_PAIR)]);
        // Under the model's own name it is there already.
        let images = (matches!(self.images, Ok(Some(_))) && !self.fills_image()).then(|| input(IMAGE));
        texts.into_iter().flatten().chain(images).collect()
    }

    /// The output that the model's own can be made into.
    pub(super) fn pooled(&self) -> Option<&TensorSpec> {
        self.pooled.as_ref()
    }

    /// The input that a body is which is nothing but an image or a text.
    pub(super) fn raw_input(&self) -> Option<&'static str> {
        match (&self.images, &self.text) {
            (Ok(Some(_)), _) => Some(IMAGE),
            (_, Ok(Some(_))) => Some(TEXT),
            _ => None,
        }
    }

    /// How texts are taken.
    ///
    /// # Errors
    /// In words, where they are not.
    pub(super) fn text(&self) -> Result<&Text, String> {
        match &self.text {
            Ok(Some(text)) => Ok(text),
            Ok(None) => Err("it has no tokenizer (tokenizer.json beside the model)".into()),
            Err(reason) => Err(reason.clone()),
        }
    }

    /// How the model gives embeddings of texts, in its output [`SENTENCE_EMBEDDING`].
    ///
    /// # Errors
    /// In words, where it gives none.
    pub(super) fn embedding(&self, pooling: Option<Pooling>) -> Result<&Text, String> {
        let text = self.text()?;
        match self.embeddings {
            None => Err("its outputs hold no embeddings".into()),
            Some(Embeddings::OfTokens(_)) if pooling.unwrap_or(text.embedding.pooling) == Pooling::None => Err(
                "it gives embeddings of tokens, and no modules.json or 1_Pooling/config.json says how they are pooled; send the parameter `pooling`"
                    .into(),
            ),
            Some(_) => Ok(text),
        }
    }

    /// Whether the model's inputs are made of these, and not these themselves.
    pub(super) fn makes(&self, inputs: &[(String, Tensor)]) -> bool {
        self.bytes(inputs).is_some()
    }

    /// Bytes that are to be made into tensors; `None` where the request holds the model's own inputs alone.
    fn bytes(&self, inputs: &[(String, Tensor)]) -> Option<usize> {
        let given = inputs.iter().filter(|(name, tensor)| self.is_given(name, tensor));
        // A few bytes of an image may hold millions of pixels.
        let bytes = |(name, tensor): &(String, Tensor)| if name == IMAGE { usize::MAX } else { tensor.data().byte_count() };
        given.map(bytes).reduce(usize::saturating_add)
    }

    fn is_given(&self, name: &str, tensor: &Tensor) -> bool {
        match name {
            TEXT | TEXT_PAIR => !self.owns(name),
            // A model may call its own input so, which takes numbers.
            IMAGE => !self.owns(name) || self.fills_image() && tensor.datatype() == Datatype::Bytes,
            _ => false,
        }
    }

    /// Whether images are taken under the name of the model's own input.
    fn fills_image(&self) -> bool {
        matches!(&self.images, Ok(Some(images)) if images.input() == IMAGE)
    }

    fn owns(&self, name: &str) -> bool {
        self.own.iter().any(|own| own == name)
    }

    /// Makes the model's inputs of those that were given.
    fn prepare(
        &self,
        mut inputs: Vec<(String, Tensor)>,
        options: Options,
        bytes_max: usize,
        hold: impl FnMut(usize) -> Result<OwnedSemaphorePermit, Refusal>,
    ) -> Result<Prepared, Refusal> {
        let mut take = |name: &str| {
            let index = inputs
                .iter()
                .position(|(given, tensor)| given == name && self.is_given(given, tensor))?;
            Some(inputs.swap_remove(index).1)
        };
        let (text, pair, image) = (take(TEXT), take(TEXT_PAIR), take(IMAGE));
        let mut mask = None;
        if let Some(given) = text {
            let text = self
                .text()
                .map_err(|reason| Refusal::invalid(format!("input `{TEXT}` is not taken: {reason}")))?;
            self.check_alone(&inputs, TEXT, |name| text.tokenizer.fills(name))?;
            let truncate = options.truncate.unwrap_or(true);
            let batch = text.fill(&given, pair.as_ref(), truncate, bytes_max).map_err(Refusal::invalid)?;
            inputs.extend(batch.inputs);
            mask = Some(batch.mask);
        } else if pair.is_some() {
            return Err(Refusal::invalid(format!("input `{TEXT_PAIR}` is given without input `{TEXT}`")));
        }
        if let Some(given) = image {
            let refuse = |reason: &str| Refusal::invalid(format!("input `{IMAGE}` is not taken: {reason}"));
            let images = match &self.images {
                Ok(Some(images)) => images,
                Ok(None) => return Err(refuse("the model has no preprocessor_config.json beside it")),
                Err(reason) => return Err(refuse(reason)),
            };
            self.check_alone(&inputs, IMAGE, |name| name == images.input())?;
            let filled = images.fill(&given, bytes_max, hold).map_err(|refused| match refused {
                Refused::Given(text) => Refusal::invalid(text),
                Refused::Memory(refusal) => refusal,
            })?;
            inputs.push((images.input().to_owned(), filled));
        }
        Ok(Prepared { inputs, mask })
    }

    /// Refuses an input of the model's own that another one fills.
    fn check_alone(&self, inputs: &[(String, Tensor)], from: &str, fills: impl Fn(&str) -> bool) -> Result<(), Refusal> {
        match inputs.iter().find(|(name, _)| fills(name)) {
            Some((name, _)) => Err(Refusal::invalid(format!(
                "input `{name}` is given, and input `{from}`, which it is made of"
            ))),
            None => Ok(()),
        }
    }

    /// What is to be done to the model's outputs: as the request says, or, for texts, as the model's files do.
    ///
    /// # Errors
    /// Where the request asks for what the model's outputs do not allow.
    pub(super) fn postprocessing(&self, prepared: &Prepared, options: Options) -> Result<Option<Postprocessing>, Refusal> {
        if prepared.mask.is_none() && options.pooling.is_none() && options.normalize.is_none() {
            return Ok(None);
        }
        let default = match &self.text {
            Ok(Some(text)) if prepared.mask.is_some() => text.embedding,
            _ => Default::default(),
        };
        let asked = options.pooling.is_some_and(|pooling| pooling != Pooling::None) || options.normalize == Some(true);
        let Some(embeddings) = self.embeddings else {
            return if asked {
                Err(Refusal::invalid("the model gives no embeddings to pool or to normalise"))
            } else {
                Ok(None)
            };
        };
        let mut pooling = options.pooling.unwrap_or(default.pooling);
        if let Embeddings::OfTexts(_) = embeddings {
            if options.pooling.is_some_and(|pooling| pooling != Pooling::None) {
                let text = format!("the model's embeddings are of texts already; `{SENTENCE_EMBEDDING}` cannot be pooled");
                return Err(Refusal::invalid(text));
            }
            pooling = Pooling::None;
        }
        let normalize = options.normalize.unwrap_or(default.normalize);
        let own_mask = || prepared.inputs.iter().find(|(name, _)| name == "attention_mask");
        let mask = prepared.mask.clone().or_else(|| Mask::of_tensor(&own_mask()?.1));
        Ok(Some(Postprocessing {
            embeddings,
            pooling,
            normalize,
            mask,
        }))
    }
}

impl Postprocessing {
    /// The output that is given pooled instead of as the model gives it.
    pub(super) fn pools(&self) -> Option<usize> {
        match self.embeddings {
            Embeddings::OfTokens(index) if self.pooling != Pooling::None => Some(index),
            _ => None,
        }
    }

    /// Pools and normalises. The pooled output comes behind the model's own.
    ///
    /// # Errors
    /// Where the outputs are not what the model's signature says.
    pub(super) fn apply(&self, outputs: &mut Vec<Tensor>) -> Result<(), Refusal> {
        let failed = |text: String| Refusal::new(Reason::Internal, format!("the model's embeddings cannot be pooled: {text}"));
        let index = match (self.embeddings, self.pools()) {
            (_, Some(index)) => {
                outputs.push(pool(&outputs[index], self.mask.as_ref(), self.pooling).map_err(failed)?);
                outputs.len() - 1
            }
            (Embeddings::OfTokens(index) | Embeddings::OfTexts(index), None) => index,
        };
        if self.normalize {
            let tensor = outputs[index].clone();
            outputs[index] = normalize(tensor).map_err(failed)?;
        }
        Ok(())
    }
}

impl State {
    /// Makes the model's own inputs of the texts and images among `inputs`, off the threads that serve connections where it takes longer.
    ///
    /// # Errors
    /// [`Refusal`], which names the input.
    pub(super) async fn prepare(self: &Arc<Self>, inputs: Vec<(String, Tensor)>, options: Options) -> Result<Prepared, Refusal> {
        let model = self.model().ok_or_else(Refusal::loading)?;
        let bytes_max = self.config.limits.body_bytes_max;
        match model.preprocessing.bytes(&inputs) {
            None => Ok(Prepared { inputs, mask: None }),
            Some(bytes) if bytes <= INLINE_BYTES_MAX => model.preprocessing.prepare(inputs, options, bytes_max, |bytes| self.hold(bytes)),
            Some(_) => {
                let state = Arc::clone(self);
                let prepare = move || {
                    let model = state.model().ok_or_else(Refusal::loading)?;
                    model.preprocessing.prepare(inputs, options, bytes_max, |bytes| state.hold(bytes))
                };
                let failed = |_| Refusal::new(Reason::Internal, "the inputs could not be processed");
                tokio::task::spawn_blocking(prepare).await.map_err(failed)?
            }
        }
    }

    /// The memory of a decoded image, of what bodies share.
    fn hold(&self, bytes: usize) -> Result<OwnedSemaphorePermit, Refusal> {
        let units = memory_units(bytes);
        if units > memory_units(self.config.limits.memory_bytes_max) {
            let text = format!("decoding the image takes {bytes} bytes, more than this server has for requests");
            return Err(Refusal::new(Reason::TooLarge, text));
        }
        let permit = Arc::clone(&self.memory).try_acquire_many_owned(units);
        permit.map_err(|_| Refusal::overloaded("many bytes of requests"))
    }
}
