package main

import (
	"encoding/pem"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"testing"
)

func TestNoServer(t *testing.T) {
	sh := newShell("CEDARPOST_ADMIN_URL=http://127.0.0.1:1", "CEDARPOST_OPS_URL=http://127.0.0.1:1")
	sh.exits(t, 1, says("cedarpost: unavailable: ", "is the server running at http://127.0.0.1:1? (CEDARPOST_ADMIN_URL"), "bundles")
	sh.exits(t, 1, says("unavailable"), "apply", "../../policies/shop")
	sh.exits(t, 1, says("is the server running?"), "health")
}

func TestServerThatIsNotTheRightOne(t *testing.T) {
	plain := httptest.NewServer(http.NotFoundHandler())
	defer plain.Close()
	secure := httptest.NewUnstartedServer(http.NotFoundHandler())
	secure.Config.ErrorLog = log.New(io.Discard, "", 0)
	secure.StartTLS()
	defer secure.Close()
	for url, hint := range map[string]string{
		plain.URL:                          "is " + plain.URL + " the right plane",
		secure.URL:                         "SSL_CERT_FILE",
		"http" + secure.URL[len("https"):]: "give its URL with https://",
	} {
		newShell().exits(t, 1, says(hint), "bundles", "--admin-url", url)
	}
}

// The command trusts the CA that SSL_CERT_FILE names.
func TestPrivateCA(t *testing.T) {
	s := httptest.NewTLSServer(http.NotFoundHandler())
	defer s.Close()
	ca := write(t, t.TempDir(), "ca.pem", string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw})))
	newShell("SSL_CERT_FILE="+ca).exits(t, 1, says("the right plane"), "bundles", "--admin-url", s.URL)
}
