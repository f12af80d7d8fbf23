//! What is done to an image before the model sees it: `preprocessor_config.json` of Hugging Face's image processors.

use serde::Deserialize;

use super::resize::Filter;

/// Largest side of a resized image.
const SIDE_MAX: usize = 1 << 13;

/// Processors whose `size` without further words is the shorter edge; for all others it is both.
const SHORTEST_EDGE: [&str; 9] = [
    "Bit",
    "CLIP",
    "ChineseCLIP",
    "ConvNext",
    "EfficientFormer",
    "LeViT",
    "MobileNetV",
    "PoolFormer",
    "Pvt",
];

/// Processors whose resizing is bicubic where they do not say.
const BICUBIC: [&str; 6] = ["Bit", "CLIP", "ChineseCLIP", "Deit", "DeiT", "LeViT"];

/// The steps, in their order; absent ones are left out.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Specification {
    pub(super) resize: Option<(Size, Filter)>,
    /// Height and width that are cut out of the middle.
    pub(super) crop: Option<(usize, usize)>,
    /// What values of 0 to 255 are multiplied with.
    pub(super) rescale: Option<f64>,
    /// By channel, or one for all: what is subtracted, and what is divided by then.
    pub(super) normalize: Option<(Vec<f64>, Vec<f64>)>,
}

/// A size to resize to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Size {
    /// Height and width, whatever the image's.
    Exact(usize, usize),
    /// The shorter edge; the other keeps the proportion.
    ShortestEdge(usize),
}

#[derive(Deserialize)]
struct Written {
    image_processor_type: Option<String>,
    feature_extractor_type: Option<String>,
    do_resize: Option<bool>,
    size: Option<WrittenSize>,
    resample: Option<u8>,
    crop_pct: Option<f64>,
    do_center_crop: Option<bool>,
    crop_size: Option<WrittenSize>,
    do_rescale: Option<bool>,
    rescale_factor: Option<f64>,
    offset: Option<bool>,
    do_normalize: Option<bool>,
    image_mean: Option<Values>,
    image_std: Option<Values>,
    do_pad: Option<bool>,
}

#[derive(Deserialize, Clone, Copy)]
#[serde(untagged)]
enum WrittenSize {
    Number(usize),
    Exact { height: usize, width: usize },
    Shortest { shortest_edge: usize, longest_edge: Option<usize> },
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Values {
    One(f64),
    Many(Vec<f64>),
}

impl Values {
    fn into_vec(self) -> Vec<f64> {
        match self {
            Self::One(value) => vec![value],
            Self::Many(values) => values,
        }
    }
}

impl Specification {
    /// Reads the file's content.
    ///
    /// # Errors
    /// In words, where it is of something else than images, lacks what it needs, or asks for what is not done here.
    pub(super) fn parse(json: &[u8]) -> Result<Self, String> {
        let written: Written = serde_json::from_slice(json).map_err(|error| error.to_string())?;
        let processor = written
            .image_processor_type
            .as_ref()
            .or(written.feature_extractor_type.as_ref())
            .cloned()
            .unwrap_or_default();
        let is_of = |family: &[&str]| family.iter().any(|name| processor.starts_with(name));
        let says_nothing = written.size.is_none() && written.image_mean.is_none() && written.do_rescale.is_none();
        if says_nothing {
            return Err(format!("it says nothing of images ({processor})"));
        }
        let unsupported = [
            (written.do_pad == Some(true), "do_pad"),
            (written.offset == Some(true), "offset"),
            (
                written.crop_pct.is_some() && written.do_center_crop.is_some(),
                "crop_pct with do_center_crop",
            ),
        ];
        if let Some((_, what)) = unsupported.into_iter().find(|(asked, _)| *asked) {
            return Err(format!("{what} is not supported"));
        }
        let number = written.resample.unwrap_or_else(|| if is_of(&BICUBIC) { 3 } else { 2 });
        let filter = Filter::of_number(number).ok_or_else(|| format!("resample is {number}, Pillow's filters are 0 to 5"))?;
        let mut crop = None;
        let mut resize = None;
        if written.do_resize.unwrap_or(written.size.is_some()) {
            let size = written.size.ok_or("do_resize is set and size is missing")?;
            let size = match size {
                WrittenSize::Exact { height, width } => Size::Exact(height, width),
                WrittenSize::Number(edge) if is_of(&SHORTEST_EDGE) => Size::ShortestEdge(edge),
                WrittenSize::Number(edge) => Size::Exact(edge, edge),
                WrittenSize::Shortest { longest_edge: Some(_), .. } => return Err("size.longest_edge is not supported".into()),
                WrittenSize::Shortest { shortest_edge, .. } => Size::ShortestEdge(shortest_edge),
            };
            let size = match size {
                // ConvNeXt crops the middle of small images only, and squeezes large ones.
                Size::ShortestEdge(edge) if processor.starts_with("ConvNext") => {
                    if edge >= 384 {
                        Size::Exact(edge, edge)
                    } else {
                        crop = Some((edge, edge));
                        Size::ShortestEdge((edge as f64 / written.crop_pct.unwrap_or(224.0 / 256.0)) as usize)
                    }
                }
                _ if written.crop_pct.is_some() => return Err("crop_pct is not supported for this processor".into()),
                other => other,
            };
            resize = Some((size, filter));
        }
        if written.do_center_crop.unwrap_or(written.crop_size.is_some()) {
            crop = Some(match written.crop_size.ok_or("do_center_crop is set and crop_size is missing")? {
                WrittenSize::Number(edge) => (edge, edge),
                WrittenSize::Exact { height, width } => (height, width),
                WrittenSize::Shortest { .. } => return Err("crop_size takes a number, or height and width".into()),
            });
        }
        let normalize = if written.do_normalize.unwrap_or(written.image_mean.is_some()) {
            let (mean, std) = written
                .image_mean
                .zip(written.image_std)
                .ok_or("do_normalize is set and image_mean or image_std is missing")?;
            Some((mean.into_vec(), std.into_vec()))
        } else {
            None
        };
        let specification = Self {
            resize,
            crop,
            rescale: written
                .do_rescale
                .unwrap_or(true)
                .then(|| written.rescale_factor.unwrap_or(1.0 / 255.0)),
            normalize,
        };
        specification.check()?;
        Ok(specification)
    }

    fn check(&self) -> Result<(), String> {
        let mut sides = vec![];
        match self.resize {
            Some((Size::Exact(height, width), _)) => sides.extend([height, width]),
            Some((Size::ShortestEdge(edge), _)) => sides.push(edge),
            None => {}
        }
        sides.extend(self.crop.into_iter().flat_map(|(height, width)| [height, width]));
        if let Some(side) = sides.into_iter().find(|side| !(1..=SIDE_MAX).contains(side)) {
            return Err(format!("a size is {side}, it may be 1 to {SIDE_MAX}"));
        }
        match &self.normalize {
            Some((_, std)) if std.contains(&0.0) => Err("image_std is 0".into()),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(json: &str) -> Result<Specification, String> {
        Specification::parse(json.as_bytes())
    }

    #[test]
    fn a_vision_transformers_specification_is_read() {
        let vit = parse(
            r#"{"do_normalize": true, "do_rescale": true, "do_resize": true, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5],
                "image_processor_type": "ViTImageProcessor", "resample": 2, "rescale_factor": 0.00392156862745098,
                "size": {"height": 224, "width": 224}}"#,
        );
        let expected = Specification {
            resize: Some((Size::Exact(224, 224), Filter::Bilinear)),
            crop: None,
            rescale: Some(0.00392156862745098),
            normalize: Some((vec![0.5; 3], vec![0.5; 3])),
        };
        assert_eq!(vit, Ok(expected));
    }

    #[test]
    fn an_older_file_means_what_its_processor_takes_it_for() {
        let clip = parse(
            r#"{"crop_size": 224, "do_center_crop": true, "do_normalize": true, "do_resize": true, "feature_extractor_type":
                "CLIPFeatureExtractor", "image_mean": [0.48], "image_std": [0.26], "resample": 3, "size": 224}"#,
        )
        .unwrap();
        assert_eq!(clip.resize, Some((Size::ShortestEdge(224), Filter::Bicubic)));
        assert_eq!((clip.crop, clip.rescale), (Some((224, 224)), Some(1.0 / 255.0)));
        let vit = parse(r#"{"feature_extractor_type": "ViTFeatureExtractor", "size": 384, "do_normalize": false}"#).unwrap();
        assert_eq!(vit.resize, Some((Size::Exact(384, 384), Filter::Bilinear)));
        let convnext =
            r#"{"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 224}, "crop_pct": 0.875, "resample": 3}"#;
        let convnext = parse(convnext).unwrap();
        assert_eq!(convnext.resize, Some((Size::ShortestEdge(256), Filter::Bicubic)));
        assert_eq!(convnext.crop, Some((224, 224)));
    }

    #[test]
    fn what_cannot_be_done_is_named() {
        let refuse = |json: &str| parse(json).unwrap_err();
        assert_eq!(
            refuse(r#"{"feature_extractor_type": "Wav2Vec2FeatureExtractor", "sampling_rate": 16000}"#),
            "it says nothing of images (Wav2Vec2FeatureExtractor)"
        );
        assert_eq!(
            refuse(r#"{"size": {"shortest_edge": 800, "longest_edge": 1333}}"#),
            "size.longest_edge is not supported"
        );
        assert_eq!(refuse(r#"{"size": 224, "do_pad": true}"#), "do_pad is not supported");
        assert_eq!(
            refuse(r#"{"size": 224, "do_normalize": true}"#),
            "do_normalize is set and image_mean or image_std is missing"
        );
        assert_eq!(refuse(r#"{"size": 0}"#), "a size is 0, it may be 1 to 8192");
        assert_eq!(
            refuse(r#"{"size": 224, "resample": 9}"#),
            "resample is 9, Pillow's filters are 0 to 5"
        );
    }
}
