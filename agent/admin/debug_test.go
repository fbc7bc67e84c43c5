// SPDX-License-Identifier: Apache-2.0

package admin

import (
	"context"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
)

// Profiles and the log level are for this machine, whatever the address.
func TestDebug(t *testing.T) {
	var level slog.LevelVar
	h := debug(&level, slog.New(slog.DiscardHandler))
	ask := func(local, method, path, body string) (int, string) {
		r := httptest.NewRequest(method, path, strings.NewReader(body))
		r = r.WithContext(context.WithValue(r.Context(), http.LocalAddrContextKey, &net.TCPAddr{IP: net.ParseIP(local), Port: 5050}))
		w := httptest.NewRecorder()
		h.ServeHTTP(w, r)
		b, _ := io.ReadAll(w.Body)
		return w.Code, string(b)
	}
	for _, c := range []struct {
		local, method, path, body string
		code                      int
		want                      string
		level                     slog.Level
	}{
		{"127.0.0.1", "GET", "/debug/pprof/", "", 200, "goroutine", slog.LevelInfo},
		{"::1", "GET", "/debug/pprof/heap?debug=1", "", 200, "heap profile", slog.LevelInfo},
		{"192.0.2.1", "GET", "/debug/pprof/", "", 403, "loopback", slog.LevelInfo},
		{"192.0.2.1", "PUT", "/debug/log-level", "debug", 403, "loopback", slog.LevelInfo},
		{"127.0.0.1", "GET", "/debug/log-level", "", 200, "INFO\n", slog.LevelInfo},
		{"127.0.0.1", "POST", "/debug/log-level", "debug", 405, "", slog.LevelInfo},
		{"127.0.0.1", "PUT", "/debug/log-level", "loud", 400, "none of", slog.LevelInfo},
		{"127.0.0.1", "PUT", "/debug/log-level", strings.Repeat(" ", 1000) + "debug", 400, "none of", slog.LevelInfo},
		{"127.0.0.1", "PUT", "/debug/log-level", "debug\n", 200, "DEBUG\n", slog.LevelDebug},
	} {
		code, got := ask(c.local, c.method, c.path, c.body)
		if code != c.code || !strings.Contains(got, c.want) || level.Level() != c.level {
			t.Errorf("%s %s %.20q on %s: %d %.100q, the level is %s", c.method, c.path, c.body, c.local, code, got, level.Level())
		}
	}
}
