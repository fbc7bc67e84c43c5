// SPDX-License-Identifier: Apache-2.0

package trust

import (
	"errors"
	"slices"
	"testing"
)

func TestSystemPlaces(t *testing.T) {
	usual, _ := SystemPlaces(nil)
	tests := []struct {
		environ      []string
		dirs, bundle []string
	}{
		{nil, usual.System, usual.Bundles},
		{[]string{"PATH=/bin", "SSL_CERT_FILE=/x.pem"}, usual.System, []string{"/x.pem"}},
		{[]string{"SSL_CERT_FILE=x.pem"}, usual.System, nil},
		{[]string{"SSL_CERT_DIR=", "SSL_CERT_FILE="}, usual.System, usual.Bundles},
		{[]string{"SSL_CERT_DIR=/a"}, []string{"/a"}, usual.Bundles},
		{[]string{"SSL_CERT_DIR=/a:/b//c/../d"}, []string{"/a", "/b/d"}, usual.Bundles},
		{[]string{"SSL_CERT_DIR=:/a:rel:"}, []string{"/a"}, usual.Bundles},
		{[]string{"SSL_CERT_DIR=rel"}, nil, usual.Bundles},
		{[]string{"SSL_CERT_DIR=/a", "SSL_CERT_DIR=/b"}, []string{"/a"}, usual.Bundles},
		{[]string{"XSSL_CERT_DIR=/a", "SSL_CERT_DIR"}, usual.System, usual.Bundles},
	}
	for _, tt := range tests {
		if got, err := SystemPlaces(tt.environ); !slices.Equal(got.System, tt.dirs) || !slices.Equal(got.Bundles, tt.bundle) || err != nil {
			t.Errorf("SystemPlaces(%q) = %q, %q, %v; want %q, %q", tt.environ, got.System, got.Bundles, err, tt.dirs, tt.bundle)
		}
	}
	if _, err := SystemPlaces([]string{"GODEBUG=netdns=go,x509usefallbackroots=1"}); !errors.Is(err, ErrFallbackRoots) {
		t.Error(err)
	}
	if res := newCA(t).Install(openDirRoot(t, t.TempDir()), Places{}, nil); res.System == nil {
		t.Error("nowhere to install is no error")
	}
	if got := UserConfigs([]string{"HOME=/home/a", "XDG_CONFIG_HOME=/x/"}); !slices.Equal(got, []string{"/x", "/home/a/.config"}) {
		t.Errorf("%q", got)
	}
	if got := UserConfigs([]string{"HOME=", "XDG_CONFIG_HOME=rel"}); len(got) > 0 {
		t.Errorf("%q", got)
	}
}
