package server

import (
	"encoding/json"
	"mime"
	"net/http"
	"strings"

	"connectrpc.com/connect/v2"
	"google.golang.org/protobuf/reflect/protoreflect"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/proto/cedarpost/v1/cedarpostv1connect"
)

// contentTypes are those of the protocols of a plane: Connect, gRPC and gRPC-Web.
var contentTypes = map[string]bool{
	"application/json": true, "application/proto": true, "application/connect+json": true, "application/connect+proto": true,
	"application/grpc": true, "application/grpc+json": true, "application/grpc+proto": true,
	"application/grpc-web": true, "application/grpc-web+json": true, "application/grpc-web+proto": true,
}

// explained adds a text to the answers that Connect gives without one: to a request that is no call of any
// of its protocols.
func explained(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		kind := r.Header.Get("Content-Type")
		if !contentTypes[kind] { // nearly no call has parameters
			kind, _, _ = mime.ParseMediaType(kind)
		}
		switch encoding := r.Header.Get("Content-Encoding"); {
		case r.Method != http.MethodPost || !contentTypes[kind]:
			w = &explaining{ResponseWriter: w}
		case encoding != "" && encoding != "identity" && (kind == "application/json" || kind == "application/proto"):
			// A small body can inflate a thousandfold.
			answerText(w, http.StatusNotImplemented, connect.CodeUnimplemented, "a compressed body is not accepted; send it without Content-Encoding")
			return
		case (kind == "application/json" || kind == "application/proto") && streamed[r.URL.Path]:
			w = &explaining{w, true}
		}
		h.ServeHTTP(w, r)
	})
}

// explaining is a writer of answers that gives those about method and content type a text.
type explaining struct {
	http.ResponseWriter
	streams bool // the call is one that streams, and the content type is that of a call that does not
}

// streamed are the paths of the calls that stream messages.
var streamed = func() map[string]bool {
	paths := map[string]bool{}
	for _, file := range []protoreflect.FileDescriptor{
		cedarpostv1.File_cedarpost_v1_authorization_proto, cedarpostv1.File_cedarpost_v1_entity_proto, cedarpostv1.File_cedarpost_v1_policy_proto,
		cedarpostv1.File_cedarpost_v1_audit_proto, cedarpostv1.File_cedarpost_v1_access_proto,
	} {
		for i := range file.Services().Len() {
			service := file.Services().Get(i)
			for j := range service.Methods().Len() {
				if m := service.Methods().Get(j); m.IsStreamingClient() || m.IsStreamingServer() {
					paths["/"+string(service.FullName())+"/"+string(m.Name())] = true
				}
			}
		}
	}
	return paths
}()

// WriteHeader implements http.ResponseWriter.
func (w *explaining) WriteHeader(status int) {
	switch status {
	case http.StatusMethodNotAllowed:
		answerText(w.ResponseWriter, status, connect.CodeUnimplemented, "a call is a POST")
	case http.StatusUnsupportedMediaType:
		if w.streams {
			answerText(w.ResponseWriter, status, connect.CodeInvalidArgument, "this call streams its messages: send Content-Type: application/connect+json, and each message in an envelope of the Connect protocol (a byte 0 and the length in four bytes, big endian, before its JSON), or use a client of Connect or gRPC, or the command line")
			return
		}
		answerText(w.ResponseWriter, status, connect.CodeInvalidArgument, "a call needs the header Content-Type: application/json (for JSON), or one of those in Accept-Post")
	default:
		w.ResponseWriter.WriteHeader(status)
	}
}

// Unwrap is for http.ResponseController.
func (w *explaining) Unwrap() http.ResponseWriter { return w.ResponseWriter }

// noSuchRoute answers requests that no service of a plane takes.
func noSuchRoute(w http.ResponseWriter, r *http.Request) {
	text := "this plane has no such route"
	switch service, _, _ := strings.Cut(strings.TrimPrefix(r.URL.Path, "/"), "/"); service {
	case cedarpostv1connect.AuthorizationServiceName:
		text = "this service is on the decision plane (--listen of the server)"
	case cedarpostv1connect.AccessServiceName, cedarpostv1connect.AuditServiceName, cedarpostv1connect.EntityServiceName, cedarpostv1connect.PolicyServiceName:
		text = "this service is on the admin plane (--admin-listen of the server)"
	}
	answerText(w, http.StatusNotFound, connect.CodeUnimplemented, text)
}

// answerText answers with an error of Connect in JSON, for people and for clients of any kind.
func answerText(w http.ResponseWriter, status int, code connect.Code, text string) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(map[string]string{"code": code.String(), "message": text})
}
