//! `grpc.reflection`: tools ask for the services and for the files that define them.

use std::collections::HashSet;
use std::sync::LazyLock;

use axum::body::Body;
use axum::extract::State as Shared;
use axum::http::HeaderMap;
use axum::response::Response;
use futures::stream;
use prost::Message as _;
use prost_types::{DescriptorProto, EnumDescriptorProto, FileDescriptorProto, FileDescriptorSet};

use super::frame::{self, Messages};
use super::proto::reflection::server_reflection_request::MessageRequest;
use super::proto::reflection::server_reflection_response::MessageResponse;
use super::proto::reflection::{
    ErrorResponse, FileDescriptorResponse, ListServiceResponse, ServerReflectionRequest, ServerReflectionResponse, ServiceResponse,
};
use super::status::Code;
use super::{Grpc, QUESTION_BYTES_MAX, reply, stopping};
use crate::server::refusal::Refusal;

/// The files of `proto/`, as `protoc --descriptor_set_out=descriptors.binpb inference.proto health.proto reflection.proto` describes them.
const DESCRIPTORS: &[u8] = include_bytes!("proto/descriptors.binpb");

static FILES: LazyLock<Vec<File>> = LazyLock::new(|| {
    // They are the same in every run, and a test reads them.
    let files = FileDescriptorSet::decode(DESCRIPTORS).unwrap_or_default().file;
    files.into_iter().map(File::of).collect()
});

/// A file, and the full names of what it defines.
struct File {
    descriptor: FileDescriptorProto,
    services: Vec<String>,
    symbols: HashSet<String>,
}

impl File {
    fn of(descriptor: FileDescriptorProto) -> Self {
        let mut symbols = HashSet::new();
        let within = |scope: &str, name: &Option<String>| format!("{scope}.{}", name.as_deref().unwrap_or_default());
        fn enums(scope: &str, of: &[EnumDescriptorProto], symbols: &mut HashSet<String>) {
            symbols.extend(of.iter().map(|of| format!("{scope}.{}", of.name())));
        }
        fn messages(scope: &str, of: &[DescriptorProto], symbols: &mut HashSet<String>) {
            for of in of {
                let name = format!("{scope}.{}", of.name());
                enums(&name, &of.enum_type, symbols);
                messages(&name, &of.nested_type, symbols);
                symbols.insert(name);
            }
        }
        messages(descriptor.package(), &descriptor.message_type, &mut symbols);
        enums(descriptor.package(), &descriptor.enum_type, &mut symbols);
        let mut services = vec![];
        for service in &descriptor.service {
            let name = within(descriptor.package(), &service.name);
            symbols.extend(service.method.iter().map(|method| within(&name, &method.name)));
            symbols.insert(name.clone());
            services.push(name);
        }
        Self {
            services,
            symbols,
            descriptor,
        }
    }
}

pub(super) async fn stream(Shared(grpc): Shared<Grpc>, headers: HeaderMap, body: Body) -> Response {
    let messages = match Messages::new(&headers, body, QUESTION_BYTES_MAX) {
        Ok(messages) => messages,
        Err(refusal) => return reply::refused(refusal),
    };
    let answers = stream::unfold(Some((grpc, messages)), |asking| async {
        let (mut grpc, mut messages) = asking?;
        let asked = tokio::select! {
            asked = next(&mut messages) => asked,
            _ = grpc.stopped.wait_for(|&stopped| stopped) => Err(stopping()),
        };
        Some(match asked {
            Ok(Some(asked)) => (Ok(frame::frame(&answer(asked), 0).into()), Some((grpc, messages))),
            Ok(None) => (Err(Ok(())), None),
            Err(refusal) => (Err(Err(refusal)), None),
        })
    });
    reply::many(answers, None)
}

async fn next(messages: &mut Messages) -> Result<Option<ServerReflectionRequest>, Refusal> {
    let Some(prefix) = messages.prefix().await? else { return Ok(None) };
    let sent = messages.message(prefix).await?.decompressed_here(QUESTION_BYTES_MAX)?;
    let asked = ServerReflectionRequest::decode(sent);
    asked
        .map(Some)
        .map_err(|error| Refusal::invalid(format!("the message is not of the method: {error}")))
}

fn answer(asked: ServerReflectionRequest) -> ServerReflectionResponse {
    let file = |found: Option<&File>, what: &str| match found {
        Some(file) => MessageResponse::FileDescriptorResponse(FileDescriptorResponse {
            file_descriptor_proto: vec![file.descriptor.encode_to_vec()],
        }),
        None => error(Code::NotFound, format!("there is no {what}")),
    };
    let response = match &asked.message_request {
        Some(MessageRequest::FileByFilename(name)) => {
            file(FILES.iter().find(|file| file.descriptor.name() == name), &format!("file `{name}`"))
        }
        Some(MessageRequest::FileContainingSymbol(name)) => {
            file(FILES.iter().find(|file| file.symbols.contains(name)), &format!("symbol `{name}`"))
        }
        Some(MessageRequest::ListServices(_)) => {
            let services = FILES.iter().flat_map(|file| &file.services);
            MessageResponse::ListServicesResponse(ListServiceResponse {
                service: services.map(|name| ServiceResponse { name: name.clone() }).collect(),
            })
        }
        None => error(Code::Unimplemented, "this server has no extensions to tell of".to_owned()),
    };
    ServerReflectionResponse {
        valid_host: asked.host.clone(),
        original_request: Some(asked),
        message_response: Some(response),
    }
}

fn error(code: Code, text: String) -> MessageResponse {
    MessageResponse::ErrorResponse(ErrorResponse {
        error_code: code as i32,
        error_message: text,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ask(asked: Option<MessageRequest>) -> MessageResponse {
        let asked = ServerReflectionRequest {
            message_request: asked,
            ..ServerReflectionRequest::default()
        };
        answer(asked).message_response.unwrap()
    }

    #[test]
    fn every_service_is_told_and_its_parts_are_found() {
        let MessageResponse::ListServicesResponse(list) = ask(Some(MessageRequest::ListServices(String::new()))) else {
            panic!("a list");
        };
        let names: Vec<&str> = list.service.iter().map(|service| service.name.as_str()).collect();
        let known = [
            "inference.GRPCInferenceService",
            "grpc.health.v1.Health",
            "grpc.reflection.v1.ServerReflection",
        ];
        assert_eq!(names, known);
        for symbol in [
            "inference.GRPCInferenceService",
            "inference.GRPCInferenceService.ModelInfer",
            "inference.ModelInferRequest.InferInputTensor",
            "inference.ModelInstanceGroup.Kind",
            "inference.DataType",
        ] {
            let MessageResponse::FileDescriptorResponse(file) = ask(Some(MessageRequest::FileContainingSymbol(symbol.to_owned()))) else {
                panic!("{symbol}");
            };
            let file = FileDescriptorProto::decode(&*file.file_descriptor_proto[0]).unwrap();
            assert_eq!(file.name(), "inference.proto");
        }
        let named = ask(Some(MessageRequest::FileByFilename("health.proto".to_owned())));
        assert!(matches!(named, MessageResponse::FileDescriptorResponse(_)));
        let unknown = ask(Some(MessageRequest::FileContainingSymbol("inference.Nothing".to_owned())));
        assert_eq!(unknown, error(Code::NotFound, "there is no symbol `inference.Nothing`".to_owned()));
        assert!(matches!(ask(None), MessageResponse::ErrorResponse(_)));
    }
}
