package server

import (
	"encoding/json"
	"mime"
	"net/http"
	"strings"

	"connectrpc.com/connect/v2"

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
			w = &explaining{w}
		case encoding != "" && encoding != "identity" && (kind == "application/json" || kind == "application/proto"):
			// A small body can inflate a thousandfold.
			answerText(w, http.StatusNotImplemented, connect.CodeUnimplemented, "a compressed body is not accepted; send it without Content-Encoding")
			return
		}
		h.ServeHTTP(w, r)
	})
}

// explaining is a writer of answers that gives those about method and content type a text.
type explaining struct{ http.ResponseWriter }

// WriteHeader implements http.ResponseWriter.
func (w *explaining) WriteHeader(status int) {
	switch status {
	case http.StatusMethodNotAllowed:
		answerText(w.ResponseWriter, status, connect.CodeUnimplemented, "a call is a POST")
	case http.StatusUnsupportedMediaType:
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
