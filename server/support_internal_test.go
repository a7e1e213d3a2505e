package server

import (
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// One dump of goroutines is made in ten seconds, however many ask for one.
func TestDumpsAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		mux := http.NewServeMux()
		(&Server{}).serveSupport(mux)
		get := func(method string) *httptest.ResponseRecorder {
			req, res := httptest.NewRequestWithContext(t.Context(), method, "http://127.0.0.1/debug/goroutines", http.NoBody), httptest.NewRecorder()
			mux.ServeHTTP(res, req)
			return res
		}
		if res := get(http.MethodHead); res.Code != http.StatusOK || res.Body.Len() > 0 {
			t.Errorf("HEAD: %d", res.Code)
		}
		for range 3 {
			if res := get(http.MethodGet); res.Code != http.StatusOK || !strings.Contains(res.Body.String(), "goroutine ") {
				t.Errorf("%d %s", res.Code, res.Body)
			}
			for range 10 {
				if res := get(http.MethodGet); res.Code != http.StatusTooManyRequests || res.Header().Get("Retry-After") != "10" || strings.Contains(res.Body.String(), "goroutine ") {
					t.Errorf("again: %d %s", res.Code, res.Body)
				}
				time.Sleep(900 * time.Millisecond)
			}
			time.Sleep(time.Second)
		}
	})
}
