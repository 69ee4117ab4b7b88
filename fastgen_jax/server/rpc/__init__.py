"""gRPC front end: fastgen.proto over the same Service as HTTP. Needs the extra `grpc`."""
