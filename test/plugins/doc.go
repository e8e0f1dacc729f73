// Package plugins runs public KMS v2 plugins, as they are published, behind the proxy, and measures
// how often the proxy calls a plugin compared with kube-apiserver.
//
// build.sh builds the plugins. A plugin that is not built is skipped: `make test` does not need
// other projects' repositories.
package plugins
