package kubeadm

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"net"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v3"
)

// program is the path of the binary in the image.
const program = "/usr/local/bin/etcd-kms-proxy"

// configAnnotation holds a digest of the configuration, so that kubelet restarts the Pod when the
// configuration changes: a reload does not apply all changes.
const configAnnotation = "etcd-kms-proxy.io/config-sha256"

// podSettings are the inputs of the proxy's static Pod.
type podSettings struct {
	image, configFile string
	config            []byte
	facts             Facts
	allowWeakening    bool
}

type (
	object    = map[string]any
	hostMount struct {
		path, kind string
		writable   bool
	}
)

// pod returns the manifest of the proxy's static Pod.
//
// The Pod runs as root, without any capability: only root can read the key files of a kubeadm
// control plane, and kubeadm's own etcd runs as root for the same reason.
func (s *podSettings) pod() ([]byte, error) {
	host, port, err := net.SplitHostPort(s.facts.Admin)
	if err != nil {
		return nil, err
	}
	number, err := strconv.Atoi(port)
	if err != nil {
		return nil, err
	}
	probe := func(path string, period, failures int) object {
		return object{"httpGet": object{"host": host, "path": path, "port": number, "scheme": "HTTP"}, "periodSeconds": period, "timeoutSeconds": 15, "failureThreshold": failures}
	}
	command := []string{program, "serve", "--config", s.configFile}
	if s.allowWeakening {
		command = append(command, "--allow-weakening")
	}
	var mounts, volumes []object
	for i, m := range s.mounts() {
		name := "host-" + strconv.Itoa(i)
		mounts = append(mounts, object{"name": name, "mountPath": m.path, "readOnly": !m.writable})
		volumes = append(volumes, object{"name": name, "hostPath": object{"path": m.path, "type": m.kind}})
	}
	digest := sha256.Sum256(s.config)
	pod := object{
		"apiVersion": "v1", "kind": "Pod",
		"metadata": object{
			"name": "etcd-kms-proxy", "namespace": "kube-system",
			"labels":      object{"component": "etcd-kms-proxy", "tier": "control-plane"},
			"annotations": object{configAnnotation: hex.EncodeToString(digest[:])},
		},
		"spec": object{
			"hostNetwork": true, "priorityClassName": "system-node-critical", "priority": 2000001000,
			"securityContext": object{"seccompProfile": object{"type": "RuntimeDefault"}},
			"containers": []object{{
				"name": "etcd-kms-proxy", "image": s.image, "imagePullPolicy": "IfNotPresent", "command": command,
				// No memory limit: while the proxy is killed and restarts, the API server has no
				// etcd.
				"resources": object{"requests": object{"cpu": "100m", "memory": "100Mi"}},
				"securityContext": object{
					"runAsUser": 0, "runAsGroup": 0, "readOnlyRootFilesystem": true, "allowPrivilegeEscalation": false,
					"capabilities": object{"drop": []string{"ALL"}},
				},
				"startupProbe":   probe("/livez", 2, 60),
				"livenessProbe":  probe("/livez", 10, 8),
				"readinessProbe": probe("/readyz", 2, 3),
				"volumeMounts":   mounts,
			}},
			"volumes": volumes,
		},
	}
	var b bytes.Buffer
	b.WriteString(generatedHeader)
	e := yaml.NewEncoder(&b)
	e.SetIndent(2)
	err = e.Encode(pod)
	return b.Bytes(), err
}

// mounts returns the folders and files of the host that the Pod needs. It mounts the whole folder
// of the configuration, and those of sockets: a mount of a single file would keep the old file
// after it is replaced by renaming. kubeadm renews certificates in place, so their files are
// mounted one by one.
func (s *podSettings) mounts() []hostMount {
	folder := filepath.Dir(s.configFile)
	all := []hostMount{{folder, "Directory", false}}
	for _, d := range s.facts.WritableFolders {
		all = append(all, hostMount{d, "Directory", true})
	}
	for _, d := range s.facts.Folders {
		all = append(all, hostMount{d, "Directory", false})
	}
	for _, f := range s.facts.Files {
		if !strings.HasPrefix(f, folder+string(filepath.Separator)) {
			all = append(all, hostMount{f, "File", false})
		}
	}
	var once []hostMount
	for _, m := range all {
		if !slices.ContainsFunc(once, func(o hostMount) bool { return o.path == m.path }) {
			once = append(once, m)
		}
	}
	return once
}
