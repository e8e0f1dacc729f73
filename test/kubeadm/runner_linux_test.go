package kubeadm

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"time"

	core "k8s.io/api/core/v1"
	"sigs.k8s.io/yaml"
)

// runner does what kubelet does with static Pods, as far as it matters here: it starts what is in
// the folder of manifests, restarts what ends, and replaces what changes, old first. It starts the
// real programs, with the node's file system as their root, and without containers.
type runner struct {
	root string
	// images are those that can be pulled.
	images map[string]bool
	// stuck says of a Pod that it is to be stopped and not to be started: as if kubelet hung.
	stuck func(*core.Pod) bool

	mu       sync.Mutex
	problems []string // that a kubelet would have

	stop, done chan struct{}
}

// running is a static Pod.
type running struct {
	manifest []byte
	cmd      *exec.Cmd
	ended    chan struct{}
	notAgain time.Time // not to be started before
}

const (
	syncEvery = 200 * time.Millisecond
	grace     = 30 * time.Second
	backOff   = 1500 * time.Millisecond
)

func (r *runner) start() {
	r.stop, r.done = make(chan struct{}), make(chan struct{})
	go func() {
		defer close(r.done)
		// The kernel kills the programs when the thread that started them ends.
		runtime.LockOSThread()
		pods := make(map[string]*running)
		for {
			r.sync(pods)
			select {
			case <-r.stop:
				for _, name := range []string{"kube-apiserver.yaml", "etcd-kms-proxy.yaml", "etcd.yaml"} {
					if p := pods[name]; p != nil {
						p.end()
					}
				}
				return
			case <-time.After(syncEvery):
			}
		}
	}()
}

// end stops all Pods.
func (r *runner) end() {
	close(r.stop)
	<-r.done
}

func (r *runner) sync(pods map[string]*running) {
	paths, _ := filepath.Glob(filepath.Join(r.root, "etc/kubernetes/manifests", "[^.]*"))
	there := make(map[string]bool)
	for _, path := range paths {
		name := filepath.Base(path)
		there[name] = true
		data, err := os.ReadFile(path)
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		p := pods[name]
		if p == nil || !bytes.Equal(p.manifest, data) {
			next := &running{manifest: data}
			if p != nil {
				p.end()
				next.notAgain = time.Now().Add(backOff)
			}
			p = next
			pods[name] = p
		}
		if !p.alive() && time.Now().After(p.notAgain) {
			p.notAgain = time.Now().Add(backOff)
			if err := r.startPod(name, p); err != nil {
				r.problem("%s: %v", name, err)
			}
		}
	}
	for name, p := range pods {
		if !there[name] {
			p.end()
			delete(pods, name)
		}
	}
}

func (r *runner) startPod(name string, p *running) error {
	var pod core.Pod
	if err := yaml.UnmarshalStrict(p.manifest, &pod); err != nil {
		return err
	}
	if r.stuck != nil && r.stuck(&pod) {
		return nil
	}
	c := pod.Spec.Containers[0]
	if !r.images[c.Image] {
		return nil // as ImagePullBackOff
	}
	for _, v := range pod.Spec.Volumes {
		info, err := os.Stat(filepath.Join(r.root, v.HostPath.Path))
		switch kind := *v.HostPath.Type; {
		case kind == core.HostPathDirectoryOrCreate && errors.Is(err, os.ErrNotExist):
			err = os.MkdirAll(filepath.Join(r.root, v.HostPath.Path), 0o755)
		case err == nil && (kind == core.HostPathFile) == info.IsDir():
			err = fmt.Errorf("%s is no %s", v.HostPath.Path, kind)
		}
		if err != nil {
			return fmt.Errorf("volume %s: %w", v.Name, err)
		}
	}
	log, err := os.OpenFile(filepath.Join(r.root, "var/log", strings.TrimSuffix(name, ".yaml")+".log"), os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer log.Close()
	program := c.Command[0]
	if !strings.Contains(program, "/") {
		program = "/usr/local/bin/" + program
	}
	p.cmd = &exec.Cmd{
		Path: program, Args: c.Command, Dir: "/", Env: []string{"PATH=/usr/local/bin"}, Stdout: log, Stderr: log,
		SysProcAttr: &syscall.SysProcAttr{Chroot: r.root, Pdeathsig: syscall.SIGKILL},
	}
	if err := p.cmd.Start(); err != nil {
		p.cmd = nil
		return err
	}
	p.ended = make(chan struct{})
	go func() {
		_ = p.cmd.Wait()
		close(p.ended)
	}()
	return nil
}

func (p *running) alive() bool {
	if p.cmd == nil {
		return false
	}
	select {
	case <-p.ended:
		return false
	default:
		return true
	}
}

// end stops a Pod as kubelet does.
func (p *running) end() {
	if !p.alive() {
		return
	}
	_ = p.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-p.ended:
	case <-time.After(grace):
		_ = p.cmd.Process.Kill()
		<-p.ended
	}
}

func (r *runner) problem(format string, args ...any) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if text := fmt.Sprintf(format, args...); len(r.problems) < 20 {
		r.problems = append(r.problems, text)
	}
}
