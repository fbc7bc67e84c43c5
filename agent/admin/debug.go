// SPDX-License-Identifier: Apache-2.0

package admin

import (
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/pprof"
	"strings"
)

// debug serves profiles, and the log level, to clients on this machine: the
// address may be open to others, for metrics, and a profile costs processor time.
func debug(level *slog.LevelVar, log *slog.Logger) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /debug/pprof/", pprof.Index)
	mux.HandleFunc("GET /debug/pprof/profile", pprof.Profile)
	mux.HandleFunc("GET /debug/pprof/symbol", pprof.Symbol)
	mux.HandleFunc("GET /debug/pprof/trace", pprof.Trace)
	if level != nil {
		mux.HandleFunc("GET /debug/log-level", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, level.Level()) })
		// A page of another site can't send a PUT here without being asked first
		// (CORS), which is not answered.
		mux.HandleFunc("PUT /debug/log-level", func(w http.ResponseWriter, r *http.Request) {
			b, _ := io.ReadAll(http.MaxBytesReader(w, r.Body, 16))
			was := level.Level()
			if err := level.UnmarshalText([]byte(strings.TrimSpace(string(b)))); err != nil {
				http.Error(w, "the level is none of debug, info, warn, error", http.StatusBadRequest)
				return
			}
			log.Warn("the log level was changed", "from", was, "to", level.Level())
			fmt.Fprintln(w, level.Level())
		})
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if _, ok := loopback(r); !ok {
			http.Error(w, "this is answered on the loopback interface only", http.StatusForbidden)
			return
		}
		mux.ServeHTTP(w, r)
	})
}
