// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"bytes"
	"context"
	"debug/elf"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// SetClock sets the wall clock that the node's running Go programs see, so far
// ahead of or behind the machine's. The machine has one wall clock for all, and
// no namespace for it (time_namespaces(7)), so what they read it by is replaced:
// the clock_gettime of their vDSO, vdso(7). Processes that start later see the
// machine's.
func (n *Node) SetClock(ahead time.Duration) {
	n.t.Helper()
	for _, pid := range n.pids() {
		if err := setClock(pid, ahead); err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, syscall.ESRCH) {
			n.t.Fatalf("setting the clock of process %d: %v", pid, err)
		}
	}
}

// clockGettime is a function that makes the system call, and adds whole seconds
// to what it says of the wall clock.
func clockGettime(ahead time.Duration) []byte {
	code := []byte{
		0xb8, 228, 0, 0, 0, // mov eax, SYS_clock_gettime
		0x0f, 0x05, // syscall
		0x85, 0xff, // test edi, edi: CLOCK_REALTIME
		0x75, 13, // jnz ret
		0x48, 0xb9, // movabs rcx, ahead
	}
	code = binary.LittleEndian.AppendUint64(code, uint64(ahead/time.Second))
	return append(code,
		0x48, 0x01, 0x0e, // add [rsi], rcx
		0xc3) // ret
}

func setClock(pid int, ahead time.Duration) error {
	if runtime.GOARCH != "amd64" {
		return errors.ErrUnsupported
	}
	base, image, err := vdso(pid)
	if err != nil || image == nil {
		return err
	}
	code := clockGettime(ahead)
	at, err := clockOffset(image, uint64(len(code)))
	if err != nil {
		return err
	}
	mem, err := os.OpenFile(fmt.Sprintf("/proc/%d/mem", pid), os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer mem.Close()
	defer func() { _ = syscall.Kill(pid, syscall.SIGCONT) }()
	// Not while a thread is in it.
	return Eventually(nil, func(context.Context) error {
		if err := syscall.Kill(pid, syscall.SIGSTOP); err != nil {
			return err
		}
		in, err := threadsIn(pid, base+at, base+at+uint64(len(code)))
		if err != nil {
			return err
		}
		if in {
			_ = syscall.Kill(pid, syscall.SIGCONT)
			return errors.New("a thread is reading the clock")
		}
		_, err = mem.WriteAt(code, int64(base+at))
		return err
	})
}

// vdso returns where a process has its vDSO, and what is there; nil if it has none.
func vdso(pid int) (base uint64, image []byte, err error) {
	maps, err := os.ReadFile(fmt.Sprintf("/proc/%d/maps", pid))
	if err != nil {
		return 0, nil, err
	}
	for line := range strings.Lines(string(maps)) {
		if !strings.HasSuffix(strings.TrimSpace(line), "[vdso]") {
			continue
		}
		var end uint64
		if _, err := fmt.Sscanf(line, "%x-%x", &base, &end); err != nil {
			return 0, nil, err
		}
		mem, err := os.Open(fmt.Sprintf("/proc/%d/mem", pid))
		if err != nil {
			return 0, nil, err
		}
		defer mem.Close()
		image = make([]byte, end-base)
		_, err = mem.ReadAt(image, int64(base))
		return base, image, err
	}
	return 0, nil, nil
}

// clockOffset finds the function in a vDSO.
func clockOffset(image []byte, size uint64) (uint64, error) {
	f, err := elf.NewFile(bytes.NewReader(image))
	if err != nil {
		return 0, err
	}
	symbols, err := f.DynamicSymbols()
	if err != nil {
		return 0, err
	}
	for _, s := range symbols {
		if s.Name == "__vdso_clock_gettime" && s.Size >= size {
			return s.Value, nil
		}
	}
	return 0, errors.New("its vDSO has no __vdso_clock_gettime, or one that is too short")
}

// threadsIn says whether a thread of a process that is being stopped runs in a
// part of its memory, or may: /proc/pid/syscall tells where one stands.
func threadsIn(pid int, from, to uint64) (bool, error) {
	tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/syscall", pid))
	if err != nil {
		return false, err
	}
	for _, task := range tasks {
		b, err := os.ReadFile(task)
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ESRCH) {
			continue
		}
		if err != nil {
			return false, err
		}
		fields := strings.Fields(string(b))
		pc, err := strconv.ParseUint(fields[len(fields)-1], 0, 64)
		if err != nil { // "running"
			return true, nil
		}
		if from < pc && pc < to {
			return true, nil
		}
	}
	return false, nil
}
