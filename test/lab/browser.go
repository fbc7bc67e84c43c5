// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"bufio"
	"context"
	enc "encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"testing"
	"time"
)

// Browser is a headless Chromium on a node, driven by its DevTools protocol
// through a pipe.
type Browser struct {
	t       testing.TB
	in      *os.File
	answers chan browserMessage
	session string
	last    int
}

type browserMessage struct {
	ID     int                       `json:"id,omitempty"`
	Method string                    `json:"method,omitempty"`
	Params any                       `json:"params,omitempty"`
	Sess   string                    `json:"sessionId,omitempty"`
	Result json.RawMessage           `json:"result,omitempty"`
	Error  *struct{ Message string } `json:"error,omitempty"`
}

// Browser starts one.
func (n *Node) Browser() *Browser {
	n.t.Helper()
	theirIn, in, err := os.Pipe()
	if err != nil {
		n.t.Fatal(err)
	}
	out, theirOut, err := os.Pipe()
	if err != nil {
		n.t.Fatal(err)
	}
	log, err := os.Create(n.t.TempDir() + "/chromium.log")
	if err != nil {
		n.t.Fatal(err)
	}
	cmd := n.command(context.Background(), nil, Debian(n.t, "/usr/bin/chromium", "chromium"), "--headless", "--remote-debugging-pipe", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
		"--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--hide-scrollbars", "--user-data-dir="+n.t.TempDir(), "about:blank")
	cmd.ExtraFiles = []*os.File{theirIn, theirOut} // 3 and 4
	cmd.Stdout, cmd.Stderr = log, log
	if err := start(cmd); err != nil {
		n.t.Fatal(err)
	}
	theirIn.Close()
	theirOut.Close()
	b := &Browser{t: n.t, in: in, answers: make(chan browserMessage, 1)}
	ended := make(chan struct{})
	go func() {
		defer close(b.answers)
		r := bufio.NewReader(out)
		for {
			line, err := r.ReadBytes(0)
			if err != nil {
				return
			}
			var m browserMessage
			if json.Unmarshal(line[:len(line)-1], &m) == nil && m.ID != 0 {
				select {
				case b.answers <- m:
				case <-ended:
					return
				}
			}
		}
	}()
	n.t.Cleanup(func() {
		close(ended)
		in.Close()
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		out.Close()
		if n.t.Failed() {
			text, _ := os.ReadFile(log.Name())
			n.t.Logf("--- log of chromium\n%s", text[max(0, len(text)-2000):])
		}
		log.Close()
	})
	var target struct{ TargetID string }
	b.call("Target.createTarget", map[string]any{"url": "about:blank"}, &target)
	var attached struct{ SessionID string }
	b.call("Target.attachToTarget", map[string]any{"targetId": target.TargetID, "flatten": true}, &attached)
	b.session = attached.SessionID
	return b
}

// call calls a method of the protocol.
func (b *Browser) call(method string, params, result any) {
	b.t.Helper()
	b.last++
	raw, err := json.Marshal(browserMessage{ID: b.last, Method: method, Params: params, Sess: b.session})
	if err == nil {
		_, err = b.in.Write(append(raw, 0))
	}
	late := time.After(waitTime)
	for err == nil {
		select {
		case m, ok := <-b.answers:
			switch {
			case !ok:
				err = errors.New("the browser has ended")
			case m.ID != b.last:
			case m.Error != nil:
				err = errors.New(m.Error.Message)
			case result == nil:
				return
			default:
				if err = json.Unmarshal(m.Result, result); err == nil {
					return
				}
			}
		case <-late:
			err = errors.New("no answer")
		}
	}
	b.t.Fatalf("the browser's %s: %v", method, err)
}

// Screen sets the size of the screen in CSS pixels, and what colours are wanted:
// light or dark.
func (b *Browser) Screen(width, height int, colours string) {
	b.t.Helper()
	b.call("Emulation.setDeviceMetricsOverride", map[string]any{"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}, nil)
	b.call("Emulation.setEmulatedMedia", map[string]any{"features": []map[string]string{{"name": "prefers-color-scheme", "value": colours}}}, nil)
}

// Open opens a page and waits until it is there with all that belongs to it, and
// an expression is true.
func (b *Browser) Open(url, until string) {
	b.t.Helper()
	b.call("Page.navigate", map[string]any{"url": url}, nil)
	b.Until(`document.readyState == "complete" && ` + until)
}

// Until waits until an expression is true.
func (b *Browser) Until(expression string) {
	b.t.Helper()
	if err := Eventually(nil, func(context.Context) error {
		if got := b.Eval(expression); got != true {
			return fmt.Errorf("it is %v", got)
		}
		return nil
	}); err != nil {
		b.t.Fatalf("the page doesn't come to %s: %v\n%v", expression, err, b.Eval("document.body.innerText"))
	}
}

// Eval is the value of an expression of JavaScript on the page, as JSON gives
// it, or what it threw as a string.
func (b *Browser) Eval(expression string) any {
	b.t.Helper()
	var r struct {
		Result           struct{ Value any }
		ExceptionDetails *struct{ Exception struct{ Description string } }
	}
	b.call("Runtime.evaluate", map[string]any{"expression": expression, "returnByValue": true}, &r)
	if r.ExceptionDetails != nil {
		return r.ExceptionDetails.Exception.Description
	}
	return r.Result.Value
}

// Screenshot writes a picture of the whole page.
func (b *Browser) Screenshot(file string) {
	b.t.Helper()
	var r struct{ Data string }
	b.call("Page.captureScreenshot", map[string]any{"captureBeyondViewport": true}, &r)
	png, err := enc.StdEncoding.DecodeString(r.Data)
	if err == nil {
		err = os.WriteFile(file, png, 0o644)
	}
	if err != nil {
		b.t.Fatal(err)
	}
}
