//! The JSON schema of `report.json`, published as `docs/report.schema.json`.

use schemars::generate::SchemaSettings;
use serde_json::Value;

use super::Report;

/// What names the schema.
const ID: &str = "https://plimsoll.dev/schemas/report/v1.json";

/// The JSON schema (draft 2020-12) of a [`Report`] as it is written.
#[must_use]
pub fn schema() -> Value {
    let generator = SchemaSettings::draft2020_12().for_serialize().into_generator();
    let mut schema = generator.into_root_schema_for::<Report>().to_value();
    tidy(&mut schema);
    schema["$id"] = ID.into();
    schema["title"] = "Report of an optimisation by Plimsoll".into();
    schema
}

/// Drops the rules that the apiserver evaluates and the formats of Rust's numbers, since other programs warn about what they do not know,
/// and the line breaks of source code.
fn tidy(schema: &mut Value) {
    match schema {
        Value::Object(object) => {
            let is_of_number = |format: &Value| format.as_str().is_some_and(|format| format.contains("int") || format == "double");
            object.retain(|keyword, value| !(keyword.starts_with("x-kubernetes-") || keyword == "format" && is_of_number(value)));
            if let Some(Value::String(description)) = object.get_mut("description") {
                let paragraphs: Vec<String> = description.split("\n\n").map(|paragraph| paragraph.replace('\n', " ")).collect();
                *description = paragraphs.join("\n\n");
            }
            object.values_mut().for_each(tidy);
        }
        Value::Array(array) => array.iter_mut().for_each(tidy),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_always_written_is_required_and_described() {
        let schema = schema();
        let required = schema["required"].as_array().unwrap();
        for field in ["summary", "gate", "outputs", "stepMs"] {
            assert!(required.contains(&field.into()), "{field}: {required:?}");
        }
        assert!(!required.contains(&"front".into()));
        assert_eq!(
            schema["properties"]["layers"]["description"],
            "What became of each weight, the largest first; at most 512."
        );
        let text = schema.to_string();
        assert!(!text.contains("x-kubernetes") && !text.contains("uint64"), "{text}");
    }
}
