{{- define "weir.selector" -}}
app.kubernetes.io/name: weir
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "weir.labels" -}}
{{ include "weir.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end }}

{{- define "weir.name" -}}
{{- if contains "weir" .Release.Name }}{{ .Release.Name }}{{ else }}{{ .Release.Name }}-weir{{ end -}}
{{- end }}

{{- define "weir.image" -}}
{{ required "image.repository has to be given: where the image is, such as registry.example.com/weir; or take the chart that `make dist` makes" .Values.image.repository }}:{{ default .Chart.AppVersion .Values.image.tag }}
{{- end }}

{{- define "weir.keySecret" -}}
{{ default (printf "%s-swarm" (include "weir.name" .)) .Values.peers.existingSecret }}
{{- end }}

{{- define "weir.loopback" -}}
{{- if or (hasPrefix "127." .Values.admin.host) (eq .Values.admin.host "::1") (eq .Values.admin.host "localhost") }}true{{ end -}}
{{- end }}

{{/* Where the kubelet asks: an address that stands for all is the node's own. */}}
{{- define "weir.probe" -}}
{{- if not (has .Values.admin.host (list "0.0.0.0" "::")) }}
host: {{ .Values.admin.host | quote }}
{{- end }}
port: {{ .Values.admin.port }}
{{- end }}

{{/* Each of these is needed, and nothing else: see deploy/README.md. */}}
{{- define "weir.securityContext" -}}
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
  add:
    - SYS_ADMIN    # loads eBPF programs, enters network namespaces
    - NET_ADMIN    # attaches the programs to connections
    - SYS_PTRACE   # reaches the runtimes' files through /proc
    - DAC_OVERRIDE # reads and writes files of containers, whoever owns them
    - FOWNER       # replaces its own files there
    {{- if .Values.restartRuntimes }}
    - SYS_CHROOT   # runs the node's systemctl
    {{- end }}
seLinuxOptions: {type: spc_t} # where there is SELinux, which would keep it from the runtimes' files
{{- if semverCompare ">=1.30.0-0" .Capabilities.KubeVersion.Version }}
appArmorProfile: {type: Unconfined} # AppArmor's default profile for containers denies ptrace
{{- end }}
{{- end }}
